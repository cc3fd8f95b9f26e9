//! Property tests with arbitrary bytes: no panic, both readers agree, and lenient differs only
//! where a reserved field is set.

use proptest::prelude::*;
use xsr_format::error::DecodeError;

use crate::support::build::*;
use crate::support::drive::*;
use crate::support::mutate::{mutant, pieces};

fn is_reserved(failure: &Failure) -> bool {
    matches!(
        failure.cause,
        Cause::Decode(DecodeError::ReservedNotZero { .. } | DecodeError::PageEntryReserved { .. })
    )
}

/// Strict and lenient results, on each of which both readers agree.
fn judged(bytes: &[u8]) -> Outcome {
    let (strict, lenient) = (strict(bytes), lenient(bytes));
    match &strict.end {
        Err(failure) if is_reserved(failure) => {
            assert!(lenient.seen.starts_with(&strict.seen));
        }
        _ => assert_eq!(strict, lenient),
    }
    if let Err(failure) = &lenient.end {
        assert!(!is_reserved(failure));
    }
    strict
}

fn bases() -> Vec<Stream> {
    let mut bases = Vec::new();
    for version in [2, 3] {
        bases.push(Stream::whole_pv(version, false, 4));
        bases.push(Stream::whole_pv(version, false, 8));
        bases.push(Stream::whole_hvm(version, false));
    }
    bases
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        judged(&bytes);
    }

    /// Valid headers, then records with a plausible header and an arbitrary body.
    #[test]
    fn arbitrary_records(
        version in 2_u32..4,
        guest in 1_u32..4,
        big: bool,
        records in prop::collection::vec(
            (
                prop_oneof![0_u32..0x14, Just(1), 0x8000_0000_u32..0x8000_0004, any::<u32>()],
                prop::collection::vec(prop_oneof![Just(0_u8), any::<u8>()], 0..48),
            ),
            0..8,
        ),
    ) {
        let mut stream = Stream::new(version, guest, big);
        stream.records = records.into_iter().map(|(kind, body)| Rec { kind, body }).collect();
        let outcome = judged(&stream.bytes());
        prop_assert!(outcome.seen.len() <= stream.records.len());
    }

    /// Batches of any entries, with roughly the amount of data that these require.
    #[test]
    fn arbitrary_batches(
        entries in prop::collection::vec((any::<u64>(), 0_u8..16), 1..6),
        keep_reserved: bool,
        bytes_more in -9_i64..9,
        big: bool,
    ) {
        let mask = if keep_reserved { u64::MAX >> 4 } else { (1 << 52) - 1 };
        let entries: Vec<_> = entries.into_iter().map(|(pfn, ty)| (pfn & mask, ty)).collect();
        let mut stream = Stream::new(3, HVM, big).policies().pages(&entries);
        let body = &mut stream.records.last_mut().unwrap().body;
        let length = body.len().saturating_add_signed(bytes_more as isize);
        body.resize(length, 0);
        let known = entries.iter().all(|(_, ty)| !(5..=8).contains(ty));
        let reserved = entries.iter().any(|(pfn, _)| pfn >> 52 != 0);
        let good = known && bytes_more == 0;
        let outcome = strict(&stream.bytes());
        prop_assert_eq!(outcome.seen.len() == 4, good && !reserved);
        prop_assert_eq!(lenient(&stream.bytes()).seen.len() == 4, good);
    }

    /// Valid streams with a little damage.
    #[test]
    fn mutants(seed: u64, base in prop::sample::select(bases())) {
        judged(&mutant(&pieces(&base.bytes()), seed));
    }

    /// The offset of a stream in its file only shifts the offsets in the results.
    #[test]
    fn offsets_are_relative(seed: u64, offset: u32) {
        let bytes = mutant(&pieces(&Stream::whole_hvm(3, false).bytes()), seed);
        let offset = u64::from(offset);
        let moved = agreed(&bytes, xsr_format::read::ReadOptions { offset, ..STRICT });
        let mut plain = strict(&bytes);
        for seen in &mut plain.seen {
            seen.position.offset += offset;
        }
        match &mut plain.end {
            Ok(end) => *end += offset,
            Err(failure) => failure.position.offset += offset,
        }
        prop_assert_eq!(moved, plain);
    }
}

/// The mutations are effective and varied; otherwise the tests above would prove little.
#[test]
fn mutants_are_various() {
    let bases: Vec<_> = bases().iter().map(|base| pieces(&base.bytes())).collect();
    let mut errors = std::collections::BTreeSet::new();
    let mut good = 0;
    for seed in 0..3000 {
        let base = &bases[seed as usize % bases.len()];
        match judged(&mutant(base, seed)).end {
            Ok(_) => good += 1,
            Err(Failure {
                cause: Cause::Decode(error),
                ..
            }) => {
                let name = format!("{error:?}");
                let end = name.find([' ', '(']).unwrap_or(name.len());
                errors.insert(name[..end].to_owned());
            }
            Err(_) => {}
        }
    }
    assert!((100..2000).contains(&good), "{good} of 3000 are good");
    assert!(errors.len() >= 11, "{errors:?}");
}
