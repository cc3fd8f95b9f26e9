//! Tests of the survey: real images, built streams whose facts are known, and hostile ones.

use std::io::Cursor;

use xsr_format::detect::Detected;
use xsr_format::survey::{DomainKind, Survey, SurveyError};
use xsr_format::{Pfn, PvInfo, ReadOptions, Walk};

use crate::support::build::*;
use crate::support::images;

fn survey(bytes: &[u8]) -> Result<Survey, SurveyError> {
    let survey = Survey::of(bytes, ReadOptions::default());
    let walk = Walk::open_seeking(Cursor::new(bytes), ReadOptions::default());
    let seeking = walk.map_err(SurveyError::from).and_then(Survey::of_walk);
    assert_eq!(format!("{survey:?}"), format!("{seeking:?}"));
    survey
}

#[test]
fn real_images_say_what_their_domains_need() {
    for image in images::committed() {
        let survey = survey(&image.bytes).unwrap();
        let name = &image.name;
        assert_eq!(survey.detected, Detected::Xl, "{name}");
        let (_, after) = image.bytes.split_at(survey.bytes as usize);
        // Some have messages of a migration after the image.
        assert!(
            after.is_empty() || after.starts_with(b"domain is yours"),
            "{name}"
        );
        assert!(matches!(survey.xen(), Some((4, 17 | 20))), "{name}");
        assert!(survey.vcpus() > 0 && survey.has_cpu_policy(), "{name}");
        assert!(!survey.is_checkpointed(), "{name}");
        let config = survey.xl.as_ref().unwrap().json().unwrap().unwrap();
        let configured = ["pv", "pvh", "hvm"].map(|kind| {
            let key = format!("\"type\": \"{kind}\"");
            config.contains(&key)
        });
        let kind = match survey.kind().unwrap() {
            DomainKind::Pv(_) => [true, false, false],
            DomainKind::Hvm { emulated } => {
                [false, emulated == Some(false), emulated == Some(true)]
            }
            other => panic!("{name}: {other:?}"),
        };
        assert_eq!(kind, configured, "{name}");
    }
}

#[test]
fn a_page_counts_as_its_last_record_says() {
    for big in [false, true] {
        for version in [2, 3] {
            let stream = Stream::whole_pv(version, big, 4);
            let survey = survey(&stream.bytes()).unwrap();
            // XTAB is no memory, XALLOC is memory without contents, BROKEN is neither.
            let types = [0, 9, 1, 0xf, 0xe, 0xd, 4, 0xc];
            let populated = types.iter().filter(|ty| !matches!(ty, 0xf | 0xd)).count();
            assert_eq!(survey.populated_pages, populated as u64);
            assert_eq!(survey.last_pfn, Some(Pfn(7)));
            assert_eq!(survey.kind(), Some(DomainKind::Pv(PvInfo::Bits32)));
            assert_eq!(survey.vcpus(), 1);
            assert_eq!(survey.has_cpu_policy(), version == 3);
        }
    }
    let again = Stream::new(3, HVM, false)
        .policies()
        .pages(&[(0, 0), (5, 0), (70_000, 0xe)])
        .pages(&[(5, 0xf), (0, 0), (70_000, 0xe), (9, 0xf)])
        .with(HVM_CONTEXT, |o| o.bytes(&hvm_context()))
        .empty(END);
    let survey = survey(&again.bytes()).unwrap();
    assert_eq!(
        (survey.populated_pages, survey.last_pfn),
        (2, Some(Pfn(70_000)))
    );
    assert_eq!(survey.kind(), Some(DomainKind::Hvm { emulated: None }));
}

#[test]
fn pages_without_contents_take_bounded_memory() {
    // One XALLOC in each range of 128 MiB.
    let far: Vec<(u64, u8)> = (0..(1 << 14) + 1).map(|n| (n << 15, 0xe)).collect();
    let stream = |entries: &[(u64, u8)]| {
        Stream::new(3, HVM, false)
            .policies()
            .pages(entries)
            .with(HVM_CONTEXT, |o| o.bytes(&hvm_context()))
            .empty(END)
            .bytes()
    };
    let (_, fewer) = far.split_last().unwrap();
    assert_eq!(survey(&stream(fewer)).unwrap().populated_pages, 1 << 14);
    let error = survey(&stream(&far)).unwrap_err();
    assert!(matches!(error, SurveyError::TooScattered), "{error}");
}

#[test]
fn a_cut_image_is_an_error() {
    let bytes = Stream::whole_hvm(3, false).bytes();
    for end in (0..bytes.len()).step_by(97) {
        survey(&bytes[..end]).unwrap_err();
    }
}
