//! Saves in the mapped layout into a file that xl has begun and libxl ends.

use std::collections::BTreeMap;
use std::io::{self, Cursor, Seek as _, SeekFrom};

use xsr_format::byte_order::ByteOrder;
use xsr_format::frame::Pfn;
use xsr_format::layout::check::{Damage, check};
use xsr_format::layout::find::read_page;
use xsr_format::layout::{LayoutError, Mapped, MappedWriter};
use xsr_format::read::ReadOptions;
use xsr_format::record::Body;
use xsr_format::record::hvm::HvmParam;
use xsr_format::slice::{SliceReader, SliceRecord};
use xsr_format::transcode::{CopyError, Layer, transcode};
use xsr_format::walk::Walk;
use xsr_format::wrapper::libxl::{LibxlHeader, LibxlRecord, LibxlWriter};
use xsr_format::wrapper::xl::XlHeader;

use super::*;

/// What xl and libxl write before the libxc stream, with a configuration of this length.
fn begun(config: usize) -> Vec<u8> {
    let json = format!("{{\"c\":\"{}\"}}", "x".repeat(config));
    let mut bytes = XlHeader::new(&json).unwrap().encode();
    bytes.extend(libxl(&[LibxlRecord::LibxcContext]));
    bytes
}

/// A libxl stream of these records.
fn libxl(records: &[LibxlRecord]) -> Vec<u8> {
    let header = LibxlHeader {
        order: ByteOrder::Little,
        legacy_converted: false,
    };
    let mut writer = LibxlWriter::new(Vec::new(), header).unwrap();
    records
        .iter()
        .for_each(|record| writer.write(record).unwrap());
    writer.into_sink()
}

/// What libxl writes after the libxc stream.
fn ended() -> Vec<u8> {
    libxl(&[LibxlRecord::LibxcContext, LibxlRecord::End]).split_off(24)
}

/// Plays xl and libxl: a file that is begun, given to the helper, and ended if all went well.
fn saved(dir: &Path, args: &str, host: &Path, config: usize, variables: &[(&str, &str)]) -> Run {
    let mut file = File::create(dir.join("s")).unwrap();
    file.write_all(&begun(config)).unwrap();
    let mut command = command(host, args, file.try_clone().unwrap(), "");
    command.env("XSR_LAYOUT", "mapped");
    command.envs(variables.iter().copied());
    let run = play(command.spawn().unwrap(), fine);
    if run.completed().0 == 0 {
        file.write_all(&ended()).unwrap();
    }
    run
}

/// The index of a file whose digests all fit.
fn index_of(file: &[u8]) -> Mapped {
    let mut source = Cursor::new(file);
    let index = Mapped::open(&mut source).unwrap().expect("an index");
    let complain = |damage: Damage| -> Result<(), LayoutError> { panic!("{damage}") };
    check(&index, &mut source, complain).unwrap();
    index
}

/// The image that `convert --layout mapped` makes of this one, up to its end.
fn converted(image: &[u8]) -> Vec<u8> {
    let mut source = image;
    let mut walk = Walk::open(&mut source, ReadOptions::default()).unwrap();
    let mut writer = MappedWriter::new(Vec::new(), false);
    let copy = |source: &mut &mut &[u8], bytes: u64, sink: &mut MappedWriter<Vec<u8>>| {
        io::copy(&mut io::Read::take(&mut **source, bytes), sink).map_err(CopyError::Write)
    };
    transcode(&mut walk, &mut writer, Layer::Xl, None, copy).unwrap();
    let (mut bytes, written) = writer.finish().unwrap();
    bytes.truncate(usize::try_from(written.image_bytes).unwrap());
    bytes
}

#[test]
fn a_still_save_is_what_convert_makes_of_one_with_its_index_in_the_header() {
    for (config, (kind, width)) in KINDS.into_iter().chain(KINDS).enumerate() {
        let dir = scratch();
        let (path, domid) = host(dir.path(), kind, width);
        let digests = if config % 2 == 0 { "0" } else { "1" };
        let variables = [("XSR_PAGE_DIGESTS", digests)];
        let run = saved(dir.path(), &save_args(domid, 0), &path, config, &variables);
        assert_eq!(run.completed(), (0, Errno::from_raw(0)), "{run:?}");
        let mut file = fs::read(dir.path().join("s")).unwrap();
        let index = index_of(&file);
        let room = index.footer().room.expect("in the header");
        assert_eq!(index.footer().page_digests.is_some(), digests == "1");
        assert!(!index.footer().moved);

        // The pages that the index finds are those of the stream.
        let stream = by_the_engine(kind, width);
        let (pages, _) = taken_apart(&stream);
        let mut source = Cursor::new(&file);
        for (pfn, contents) in pages.iter().step_by(97) {
            let found = index.find(&mut source, Pfn(*pfn)).unwrap().unwrap();
            let page = read_page(&mut source, found.data.unwrap()).unwrap();
            assert!(page[..] == contents[..], "pfn {pfn}");
        }

        // xl's header is as it was, except for the room.
        let header = XlHeader::read(&file[..], ReadOptions::default()).unwrap();
        let before = begun(config);
        let plain = index.footer().plain_header(&header).unwrap().encode();
        assert!(before.starts_with(&plain), "{kind:?}");
        let range = usize::try_from(room.from).unwrap()..usize::try_from(room.to).unwrap();
        file[range.clone()].fill(0);
        let rest = &before[plain.len()..];
        let still = [&file[..range.end], rest, &stream, &ended()].concat();
        assert!(converted(&still) == file, "{kind:?} {config}");
    }
}

/// The pages of a stream with their contents, and its HVM parameters.
fn taken_apart(stream: &[u8]) -> (BTreeMap<u64, &[u8]>, Vec<HvmParam>) {
    let (mut pages, mut params) = (BTreeMap::new(), Vec::new());
    for record in SliceReader::new(stream, ReadOptions::default()).unwrap() {
        match record.unwrap() {
            SliceRecord::PageData(data) => {
                let mut contents = data.pages.iter();
                let entries = data.entries.iter();
                for entry in entries.filter(|entry| entry.page_type.has_data()) {
                    pages.insert(entry.pfn.0, &contents.next().unwrap()[..]);
                }
            }
            SliceRecord::Record(record) => {
                if let Body::HvmParams(found) = record.body {
                    params.extend(found.iter());
                }
            }
        }
    }
    (pages, params)
}

#[test]
fn a_live_one_is_restored_to_the_same_memory() {
    for kind in [GuestKind::Hvm, GuestKind::Pvh] {
        let dir = scratch();
        let (path, domid) = host(dir.path(), kind, 8);
        let run = saved(
            dir.path(),
            &save_args(domid, 0),
            &path,
            5,
            &[("XSR_LIVE", "1")],
        );
        assert_eq!(run.completed(), (0, Errno::from_raw(0)));
        let before = MockHost::open(&path).unwrap().memory_digest(domid).unwrap();
        let image = dir.path().join("s");
        let bytes = fs::read(&image).unwrap();
        let from = index_of(&bytes).footer().room.unwrap().to + 24;
        let mut file = File::open(&image).unwrap();
        file.seek(SeekFrom::Start(from)).unwrap();

        let other = dir.path().join("other");
        fs::create_dir(&other).unwrap();
        let (path, domid, ports) = restore::empty(&other, (kind, 2));
        let child = start(
            &path,
            &restore::restore_args(domid, ports),
            file.try_clone().unwrap(),
        );
        let run = play(child, fine);
        assert_eq!(run.completed(), (0, Errno::from_raw(0)), "{run:?}");
        // libxl continues where the stream ends.
        let mut rest = Vec::new();
        file.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, ended());

        let after = MockHost::open(&path).unwrap().memory_digest(domid).unwrap();
        let (_, params) =
            taken_apart(&bytes[usize::try_from(from).unwrap()..bytes.len() - rest.len()]);
        // A restore writes the rings of xenstore and console, and the page of their descriptions.
        let rings = params
            .iter()
            .filter(|param| [1, 5, 6, 17].contains(&param.index));
        let rings: Vec<Pfn> = rings.map(|param| Pfn(param.value)).collect();
        let mut differ = before.differences(&after);
        differ.retain(|pfn| !rings.contains(pfn));
        assert_eq!(differ, [], "{kind:?}");
    }
}

#[test]
fn what_has_no_header_of_xl_gets_the_stream_layout() {
    let dir = scratch();
    let (path, domid) = host(dir.path(), GuestKind::Pvh, 8);
    let expected = by_the_engine(GuestKind::Pvh, 8);
    let args = save_args(domid, 0);
    let again = |stream: Stdio| {
        let mut command = command(&path, &args, stream, "");
        command.env("XSR_LAYOUT", "mapped");
        let run = play(command.spawn().unwrap(), fine);
        assert_eq!(run.completed().0, 0);
        run.logged(7, "so it gets the stream layout");
        let host = MockHost::open(&path).unwrap();
        host.domain(domid).unwrap().resume().unwrap();
    };
    // libvirt's header, say.
    let mut file = File::create(dir.path().join("s")).unwrap();
    file.write_all(b"another header").unwrap();
    again(file.try_clone().unwrap().into());
    let written = fs::read(dir.path().join("s")).unwrap();
    assert!(written.strip_prefix(b"another header") == Some(&expected));
    // More stands before the stream than xl and libxl have written.
    let file = File::create(dir.path().join("s")).unwrap();
    let more = [&begun(0)[..], &[0; 8]].concat();
    (&file).write_all(&more).unwrap();
    again(file.into());
    let written = fs::read(dir.path().join("s")).unwrap();
    assert!(written.strip_prefix(&more[..]) == Some(&expected));
    // Something follows.
    let mut file = File::create(dir.path().join("s")).unwrap();
    file.write_all(&[&begun(0)[..], b"tail"].concat()).unwrap();
    file.seek(SeekFrom::End(-4)).unwrap();
    again(file.into());
    let (mut reader, writer) = io::pipe().unwrap();
    let reading = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        bytes
    });
    again(writer.into());
    assert!(reading.join().unwrap() == expected);
}

#[test]
fn a_failed_save_leaves_what_xl_has_written() {
    let dir = scratch();
    let (path, domid) = host(dir.path(), GuestKind::Pvh, 8);
    let args = save_args(domid, 0);
    let mut file = File::create(dir.path().join("s")).unwrap();
    file.write_all(&begun(3)).unwrap();
    let mut command = command(&path, &args, file, "");
    command.env("XSR_LAYOUT", "mapped").env("XSR_LIVE", "1");
    let refused = |number| match number {
        SUSPEND => Some(0),
        number => fine(number),
    };
    let run = play(command.spawn().unwrap(), refused);
    assert_eq!(run.completed(), (-1, Errno::EIO));
    assert!(fs::read(dir.path().join("s")).unwrap() == begun(3));
    let run = saved(dir.path(), &args, &path, 3, &[("XSR_LAYOUT", "slots")]);
    assert_eq!(run.completed().0, -1);
    run.logged(8, "XSR_LAYOUT is \"slots\", expected");
    assert!(!run.numbers().contains(&SUSPEND));
}
