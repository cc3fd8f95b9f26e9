//! The save helper's restores: the frames of the rings, the rest of the stream, and bad streams.

use super::*;
use images::{image, layers};

/// An image written by a real Xen, reduced to its libxc stream.
fn libxc_stream(name: &str) -> Vec<u8> {
    let bytes = fs::read(image(name)).unwrap();
    let (_, start, end) = layers(&bytes);
    bytes[start..end].to_vec()
}

pub(super) fn restore_args(domid: DomId, ports: (u32, u32)) -> String {
    let (store, console) = ports;
    format!(
        "--restore-domain 7 -1 {} {store} 0 {console} 0 {RESTORE_CALLBACKS} 0",
        domid.0
    )
}

/// A host with an empty domain, and the domain's event channels for xenstore and console.
pub(super) fn empty(dir: &Path, (kind, vcpus): (GuestKind, u32)) -> (PathBuf, DomId, (u32, u32)) {
    let path = dir.join("host");
    let host = MockHost::create(&path, &HostConfig::default()).unwrap();
    let domid = host.create_domain(kind, vcpus, 8192).unwrap();
    let domain = host.domain(domid).unwrap();
    let ports = (
        domain.alloc_unbound_port(DomId(0)).unwrap(),
        domain.alloc_unbound_port(DomId(0)).unwrap(),
    );
    (path, domid, ports)
}

#[test]
fn a_restore_says_where_the_rings_are_and_leaves_the_rest_of_the_stream_alone() {
    for (name, kind) in [("tpv", GuestKind::Pv), ("tpvh", GuestKind::Pvh)] {
        let dir = scratch();
        let (path, domid, ports) = empty(dir.path(), (kind, 1));
        // libxl reads on after END, so the helper must not consume a byte of that.
        let file = dir.path().join("stream");
        let mut bytes = libxc_stream(name);
        let end = bytes.len() as u64;
        bytes.extend([0x5a; 100]);
        fs::write(&file, bytes).unwrap();
        let mut ours = fs::File::options()
            .read(true)
            .write(true)
            .open(&file)
            .unwrap();
        let theirs = ours.try_clone().unwrap();
        let run = play(start(&path, &restore_args(domid, ports), theirs), fine);
        assert_eq!(run.completed(), (0, Errno::from_raw(0)), "{run:?}");
        assert_eq!(run.numbers(), [STATIC_DATA_DONE, RESTORE_RESULTS, COMPLETE]);
        assert_eq!(run.asked[0].1, [0; 4], "nothing is missing");
        let mut rings = Arguments(&run.asked[1].1);
        let (store, console) = (rings.u64(), rings.u64());
        assert!(store != 0 && console != 0 && store != console);
        run.logged(5, "Found x86");
        run.logged(
            5,
            &format!("XenStore: mfn {store:#x}, dom 0, evt {}", ports.0),
        );
        let mut rest = Vec::new();
        let at = std::io::Seek::stream_position(&mut ours).unwrap();
        ours.read_to_end(&mut rest).unwrap();
        assert_eq!((at, rest), (end, vec![0x5a; 100]));
    }
}

#[test]
fn a_bad_stream_fails_the_restore_with_einval() {
    let dir = scratch();
    let (path, domid, ports) = empty(dir.path(), (GuestKind::Pv, 1));
    let file = dir.path().join("stream");
    let mut bytes = libxc_stream("tpv");
    bytes.truncate(bytes.len() / 2);
    fs::write(&file, bytes).unwrap();
    let stream = fs::File::options()
        .read(true)
        .write(true)
        .open(&file)
        .unwrap();
    let run = play(start(&path, &restore_args(domid, ports), stream), fine);
    assert_eq!(run.completed(), (-1, Errno::EINVAL));
    // libxl treats an end without results as a crash of the helper.
    assert_eq!(run.asked[1], (RESTORE_RESULTS, vec![0; 16]));
    run.logged(8, "restore failed");
}

/// The stream of a guest that has seen AVX512F, and a host without it that has an empty domain.
fn richer(dir: &Path) -> (PathBuf, DomId, (u32, u32), PathBuf) {
    let config = HostConfig {
        processor: "+avx512f".parse().unwrap(),
        ..HostConfig::default()
    };
    let rich = MockHost::ephemeral(&config).unwrap();
    let domid = rich
        .create_guest(&GuestSpec::new("web", GuestKind::Pvh, 8))
        .unwrap();
    let domain = rich.domain(domid).unwrap();
    let mut stream = Vec::new();
    xsr_save_restore::SaveRequest::new(domain.as_ref(), rich.xen_version().unwrap())
        .options(&SaveOptions::default())
        .observe(&mut |_| std::ops::ControlFlow::Continue(()))
        .write_stream(
            &mut DirectToolstack(domain.as_ref()),
            &mut CopySink(&mut stream),
        )
        .unwrap()
        .keep_suspended();
    let file = dir.join("stream");
    fs::write(&file, stream).unwrap();
    let (path, domid, ports) = empty(dir, (GuestKind::Pvh, 1));
    (path, domid, ports, file)
}

const SEEN: &str = "a CPU feature that this host lacks: AVX512F";

/// A drop-in replacement must restore what libxl's own helper restores: it warns.
#[test]
fn a_feature_less_is_a_warning_unless_the_environment_refuses() {
    let cases = [
        (None, true),
        (Some("warn"), true),
        (Some("refuse"), false),
        (Some("perhaps"), false),
    ];
    for (plan, restored) in cases {
        let dir = scratch();
        let (path, domid, ports, file) = richer(dir.path());
        let args = restore_args(domid, ports);
        let mut command = command(&path, &args, File::open(&file).unwrap(), "");
        command.env_remove("XSR_PLAN");
        if let Some(plan) = plan {
            command.env("XSR_PLAN", plan);
        }
        let run = play(command.spawn().unwrap(), fine);
        let warned = run
            .log
            .iter()
            .any(|(level, text)| *level == 7 && text.contains(SEEN));
        assert_eq!(warned, restored, "{plan:?}: {run:?}");
        match (plan, restored) {
            (_, true) => {
                assert_eq!(run.completed(), (0, Errno::from_raw(0)), "{run:?}");
                assert_eq!(run.numbers(), [STATIC_DATA_DONE, RESTORE_RESULTS, COMPLETE]);
            }
            (Some("refuse"), _) => {
                assert_eq!(run.completed(), (-1, Errno::EOPNOTSUPP), "{run:?}");
                // No memory, and no message to libxl except the end.
                assert_eq!(run.numbers(), [RESTORE_RESULTS, COMPLETE]);
                run.logged(8, "it lacks AVX512F;");
                run.logged(8, "XSR_PLAN=warn");
            }
            _ => run.logged(8, "expected warn or refuse"),
        }
        if !restored {
            let host = MockHost::open(&path).unwrap();
            let info = host.domain(domid).unwrap().info().unwrap();
            assert_eq!(info.tot_pages, 0, "{plan:?}");
        }
    }
}
