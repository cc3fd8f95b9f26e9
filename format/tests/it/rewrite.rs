//! Tests of the rewriter: a copy is that of `transcode`, changes are where the closure wants them,
//! in any byte order, and hostile input is an error.

use xsr_format::record::hvm::HvmParam;
use xsr_format::rewrite::{Edit, Item, NewItem, RewriteError, rewrite};
use xsr_format::transcode::{Layer, TranscodeError, copy_bytes, transcode};
use xsr_format::wrapper::libxl::{LibxlRecord, LibxlRecordKind};
use xsr_format::{Body, Content, ReadOptions, RecordKind, Walk, XlHeader};

use crate::support::build::*;
use crate::support::images;
use crate::support::mutate::{cut_down, mutant, pieces};

const NOTE: RecordKind = RecordKind(0x8000_0042);

fn edited(bytes: &[u8], edit: impl FnMut(Item<'_>) -> Edit) -> Result<Vec<u8>, RewriteError> {
    let walk = Walk::open(bytes, ReadOptions::default());
    let mut copy = Vec::new();
    rewrite(
        &mut walk.map_err(TranscodeError::from)?,
        &mut copy,
        copy_bytes,
        edit,
    )?;
    Ok(copy)
}

/// The items of an image, by name.
fn names(bytes: &[u8]) -> Vec<String> {
    let mut walk = Walk::open(bytes, ReadOptions::default()).unwrap();
    let mut names = Vec::new();
    while let Some(step) = walk.next_step().unwrap() {
        names.push(match step.content {
            Content::XlHeader(_) => "xl".to_owned(),
            Content::LibxlHeader(_) => "libxl".to_owned(),
            Content::Headers(..) => "libxc".to_owned(),
            Content::LibxlRecord(record) => format!("{}", record.kind()),
            Content::Record(record) => format!("{}", record.kind),
            Content::PageData(_) => "PAGE_DATA".to_owned(),
        });
    }
    names
}

fn note() -> NewItem {
    NewItem::Record {
        kind: NOTE,
        body: vec![1, 2, 3],
    }
}

#[test]
fn what_is_kept_is_copied_as_by_transcode() {
    for image in images::committed() {
        // Xen writes version 3, little endian: nothing changes. Some have messages of a migration
        // after the image.
        let copy = edited(&image.bytes, |_| Edit::Keep).unwrap();
        let (whole, after) = image.bytes.split_at(copy.len());
        assert!(copy == whole, "{}", image.name);
        assert!(after.is_empty() || after.starts_with(b"domain is yours"));
    }
    for (version, big) in [(2, false), (2, true), (3, true)] {
        for stream in [
            Stream::whole_pv(version, big, 8),
            Stream::whole_hvm(version, big),
        ] {
            let bytes = stream.bytes();
            let mut expected = Vec::new();
            let mut walk = Walk::open(&bytes[..], ReadOptions::default()).unwrap();
            transcode(&mut walk, &mut expected, Layer::Libxc, None, copy_bytes).unwrap();
            let copy = edited(&bytes, |_| Edit::Keep).unwrap();
            assert!(copy == expected, "{version} {big}");
        }
    }
}

#[test]
fn records_are_dropped_replaced_and_inserted_in_any_byte_order() {
    for (version, big) in [(3, false), (3, true), (2, true)] {
        let bytes = Stream::whole_hvm(version, big).bytes();
        let copy = edited(&bytes, |item| match item {
            Item::Record(record) => match record.body {
                Body::TscInfo(_) => Edit::Drop,
                Body::HvmContext(_) => Edit::InsertBefore(vec![note()]),
                Body::HvmParams(params) => {
                    // From values, so the byte order of the source does not matter.
                    let param = params.iter().next().unwrap();
                    let HvmParam { index, value } = param;
                    let words = [1, index, value + 1];
                    Edit::Replace(vec![NewItem::Record {
                        kind: record.kind,
                        body: words.iter().flat_map(|w: &u64| w.to_le_bytes()).collect(),
                    }])
                }
                Body::End => Edit::InsertBefore(vec![note(), note()]),
                _ => Edit::Keep,
            },
            Item::PageData(entries) if entries.iter().any(|e| e.pfn.0 == 0) => {
                Edit::InsertAfter(vec![note()])
            }
            _ => Edit::Keep,
        });
        let copy = copy.unwrap();
        let note = NOTE.to_string();
        let all = names(&copy);
        let static_data = all
            .iter()
            .position(|name| name == "STATIC_DATA_END")
            .unwrap();
        let expected = [
            "PAGE_DATA",
            &note,
            "PAGE_DATA",
            &note,
            "HVM_CONTEXT",
            "HVM_PARAMS",
            &note,
            &note,
            "END",
        ];
        assert_eq!(all[static_data + 1..], expected, "{version} {big}");
        let mut walk = Walk::open(&copy[..], ReadOptions::default()).unwrap();
        while walk.next_step().unwrap().is_some() {}
        let expected = HvmParam {
            index: 1,
            value: 0xfeffd,
        };
        assert_eq!(walk.guest().unwrap().hvm_params(), [expected]);
    }
}

#[test]
fn wrappers_are_edited_in_their_own_layer_only() {
    let image = images::committed().remove(0);
    let header = XlHeader::new("{\"c_info\": {}}").unwrap();
    let optional = LibxlRecord::Optional {
        kind: LibxlRecordKind(0x8000_0007),
        body: vec![7; 5],
    };
    let copy = edited(&image.bytes, |item| match item {
        Item::XlHeader(_) => Edit::Replace(vec![NewItem::XlHeader(header.clone())]),
        Item::Libxl(LibxlRecord::End) => Edit::InsertBefore(vec![NewItem::Libxl(optional.clone())]),
        _ => Edit::Keep,
    });
    let copy = copy.unwrap();
    assert!(copy.starts_with(&header.encode()));
    let all = names(&copy);
    let (_, last) = all.split_at(all.len() - 2);
    assert_eq!(last, ["optional type 0x80000007", "END"]);
    let wrong = edited(&image.bytes, |item| match item {
        Item::Record(_) => Edit::InsertAfter(vec![NewItem::Libxl(optional.clone())]),
        _ => Edit::Keep,
    });
    let error = wrong.unwrap_err();
    assert!(matches!(error, RewriteError::Layer { .. }), "{error}");
    assert_eq!(
        error.to_string(),
        "a new libxl record cannot be written beside a libxc record"
    );
}

#[test]
fn damaged_images_are_refused_or_copied_to_good_ones() {
    let bytes = cut_down(&images::committed().remove(0).bytes, 3, 8);
    for end in (0..bytes.len()).step_by(61) {
        edited(&bytes[..end], |_| Edit::Keep).unwrap_err();
    }
    let pieces = pieces(&bytes);
    for seed in 0..300 {
        let mutant = mutant(&pieces, seed);
        if let Ok(copy) = edited(&mutant, |_| Edit::Keep) {
            assert!(names(&copy).ends_with(&["END".to_owned()]), "seed {seed}");
        }
    }
}
