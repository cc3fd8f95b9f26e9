//! xenopsd as an emu-manager sees it: two pipes, and a suspend image around the stream.

use std::fs::{self, File};
use std::io::{
    self, BufRead as _, BufReader, PipeReader, PipeWriter, Read as _, Seek as _, Write as _,
};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The image's bytes before the head of the libxc record: their number is not a multiple of 8.
pub(crate) const BEFORE: &[u8] = b"XenSavedDomv2-\n and a record of xenopsd";
/// The head of the libxc record.
const LIBXC: [u8; 16] = [0xf0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// The image's bytes after END.
pub(crate) const AFTER: &[u8] = b"\xff\xff\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
/// An emu-manager that takes longer than this is considered hung.
const PATIENCE: Duration = Duration::from_secs(100);

/// The type of a stream's descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A file, opened with O_APPEND, or for reading only.
    File,
    Pipe,
    Socket,
}

pub(crate) const STREAMS: [Kind; 3] = [Kind::File, Kind::Pipe, Kind::Socket];

/// The program as xenopsd starts it: descriptors 5 (lines from xenopsd), 6 (to it), 7 (the stream).
pub(crate) fn command(program: &str, words: &str) -> Command {
    let mut command = Command::new("sh");
    command
        .args([
            "-c",
            "exec \"$0\" \"$@\" 5<&0 6>&1 7>&2 </dev/null >/dev/null 2>&1",
        ])
        .arg(program)
        .args(words.split_whitespace());
    command
}

/// A running emu-manager, and xenopsd's ends of its pipes.
pub(crate) struct Xenopsd {
    child: Child,
    from: BufReader<PipeReader>,
    to: Option<PipeWriter>,
    /// The directory with the file in which the emu-manager lists whatever it has left on.
    run: Option<PathBuf>,
    /// Lines that have arrived.
    pub(crate) lines: Vec<String>,
    _watch: Sender<()>,
}

/// How a run of the emu-manager ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) lines: Vec<String>,
    pub(crate) code: Option<i32>,
}

impl Ended {
    /// The text after `prefix` of each line that begins with it.
    pub(crate) fn with(&self, prefix: &str) -> Vec<&str> {
        let lines = self.lines.iter();
        lines.filter_map(|line| line.strip_prefix(prefix)).collect()
    }

    /// Asserts that the run failed, and that the last line says so with this text.
    #[track_caller]
    pub(crate) fn failed(&self, code: i32, text: &str) {
        let errors = self.with("error:");
        assert_eq!(errors.len(), 1, "{self:?}");
        assert!(errors[0].contains(text), "no {text:?} in {self:?}");
        assert!(self.lines.last().unwrap().starts_with("error:"), "{self:?}");
        assert!(self.with("result:").is_empty(), "{self:?}");
        assert_eq!(self.code, Some(code), "{self:?}");
    }

    /// Asserts that the run ended in good order after an abort.
    #[track_caller]
    pub(crate) fn aborted(&self) {
        assert!(self.with("error:").is_empty(), "{self:?}");
        assert!(self.with("result:").is_empty(), "{self:?}");
        assert_eq!(self.code, Some(0), "{self:?}");
    }

    /// Asserts that the run succeeded, and returns its result.
    #[track_caller]
    pub(crate) fn succeeded(&self) -> &str {
        let results = self.with("result:");
        assert!(self.with("error:").is_empty(), "{self:?}");
        assert_eq!((results.len(), self.code), (1, Some(0)), "{self:?}");
        results[0]
    }
}

impl Xenopsd {
    /// Starts the emu-manager on a mock machine, with `stream` as its descriptor 7.
    pub(crate) fn start(machine: &Path, words: &str, stream: OwnedFd) -> Self {
        Self::start_with(machine, words, stream, &mut |_| {})
    }

    pub(crate) fn start_with(
        machine: &Path,
        words: &str,
        stream: OwnedFd,
        more: &mut dyn FnMut(&mut Command),
    ) -> Self {
        let words = format!("-controloutfd 6 -controlinfd 5 -fd 7 -domid 1 {words}");
        let mut command = command(env!("CARGO_BIN_EXE_xsr-emu-manager-mock"), &words);
        let backend = format!("mock:{}", machine.display());
        let run = machine.with_extension("run");
        fs::create_dir_all(&run).ok();
        command
            .env("XSR_EMU_TEST_BACKEND", backend)
            .env("XSR_EMU_TEST_RUN", run);
        more(&mut command);
        Self::spawn(command, stream)
    }

    /// Starts `command`, which [`command`] has made.
    pub(crate) fn spawn(mut command: Command, stream: OwnedFd) -> Self {
        let (out, its_out) = io::pipe().unwrap();
        let (its_in, to) = io::pipe().unwrap();
        let child = command
            .stdin(its_in)
            .stdout(its_out)
            .stderr(Stdio::from(stream))
            .spawn()
            .unwrap();
        let run = command
            .get_envs()
            .find(|(name, _)| *name == "XSR_EMU_TEST_RUN")
            .and_then(|(_, value)| Some(PathBuf::from(value?)));
        // The command holds our copies of the child's descriptors.
        drop(command);
        let pid = Pid::from_raw(child.id().try_into().unwrap());
        let (watch, ended) = mpsc::channel::<()>();
        thread::spawn(move || {
            if ended.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
                kill(pid, Signal::SIGKILL).ok();
            }
        });
        Self {
            child,
            from: BufReader::new(out),
            to: Some(to),
            lines: Vec::new(),
            run,
            _watch: watch,
        }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().try_into().unwrap())
    }

    /// Reads the next line; `None` at the end.
    pub(crate) fn next(&mut self) -> Option<String> {
        let mut line = String::new();
        if self.from.read_line(&mut line).unwrap() == 0 {
            return None;
        }
        assert!(line.len() <= 128 && line.contains(':'), "{line:?}");
        let line = line.strip_suffix('\n').unwrap().to_owned();
        self.lines.push(line.clone());
        Some(line)
    }

    /// Reads lines up to one with this prefix; false if there was none.
    pub(crate) fn until(&mut self, prefix: &str) -> bool {
        loop {
            match self.next() {
                None => return false,
                Some(line) if line.starts_with(prefix) => return true,
                Some(_) => {}
            }
        }
    }

    /// Sends a text, even if the emu-manager has gone.
    pub(crate) fn say(&mut self, text: &str) {
        if let Some(to) = &mut self.to {
            to.write_all(text.as_bytes()).ok();
        }
    }

    /// Waits until the emu-manager has read everything that was sent.
    pub(crate) fn wait_until_heard(&self) {
        let to = self.to.as_ref().unwrap();
        while rustix::io::ioctl_fionread(to).unwrap() > 0 {
            thread::yield_now();
        }
    }

    /// Closes the pipe for lines from xenopsd.
    pub(crate) fn hang_up(&mut self) {
        self.to = None;
    }

    /// Reads the remaining lines, and waits for the end.
    pub(crate) fn end(mut self) -> Ended {
        while self.next().is_some() {}
        self.wait()
    }

    /// Waits for the end without reading more lines. Asserts that no dirty log is on and no page
    /// mapped.
    pub(crate) fn wait(mut self) -> Ended {
        drop(self.from);
        drop(self.to);
        let code = self.child.wait().unwrap().code();
        if let Some(run) = self.run {
            let left = fs::read_to_string(run.join("left")).ok();
            assert_eq!(left, None, "{:?}", self.lines);
        }
        Ended {
            lines: self.lines,
            code,
        }
    }
}

/// The destination of a save, from xenopsd's side.
pub(crate) struct Target {
    /// xenopsd's descriptor, which the emu-manager shares.
    ours: File,
    flags: i32,
    far: Far,
}

enum Far {
    File(PathBuf),
    /// A block device, where the image ends before the device does.
    Device(PathBuf),
    /// A reader, and the sender that starts it.
    Reader(JoinHandle<Vec<u8>>, Sender<()>),
}

impl Target {
    /// A stream that begins with xenopsd's own bytes. With `read`, it is read from the start;
    /// otherwise only after a call of [`Target::read`].
    pub(crate) fn new(kind: Kind, dir: &Path, read: bool) -> Self {
        let (ours, far): (OwnedFd, _) = match kind {
            Kind::File => {
                let path = dir.join("image");
                let file = File::options().append(true).create_new(true).open(&path);
                (file.unwrap().into(), Far::File(path))
            }
            Kind::Pipe => {
                let (from, to) = io::pipe().unwrap();
                (to.into(), reader(from.into()))
            }
            Kind::Socket => {
                let (from, to) = UnixStream::pair().unwrap();
                (to.into(), reader(from.into()))
            }
        };
        let target = Self::begun(ours.into(), far);
        if read {
            target.read();
        }
        target
    }

    /// A suspend image on a block device, which xenopsd opens as it does a file.
    pub(crate) fn on_device(path: &Path) -> Self {
        let device = File::options().append(true).open(path).unwrap();
        Self::begun(device, Far::Device(path.to_owned()))
    }

    fn begun(mut ours: File, far: Far) -> Self {
        let flags = fcntl(&ours, FcntlArg::F_GETFL).unwrap();
        ours.write_all(BEFORE).unwrap();
        Self { ours, flags, far }
    }

    /// Starts reading the stream.
    pub(crate) fn read(&self) {
        if let Far::Reader(_, begin) = &self.far {
            begin.send(()).ok();
        }
    }

    /// A descriptor for the emu-manager.
    pub(crate) fn fd(&self) -> OwnedFd {
        self.ours.as_fd().try_clone_to_owned().unwrap()
    }

    /// Writes the head of the libxc record, as xenopsd does.
    pub(crate) fn head(&mut self) {
        self.ours.write_all(&LIBXC).unwrap();
    }

    /// The whole image, including xenopsd's own records after END, which are written at the
    /// descriptor's current offset as xenopsd does.
    pub(crate) fn image(mut self) -> Vec<u8> {
        if let Far::File(path) = &self.far {
            // A suspend VDI is a block device, where O_APPEND does not move to the end.
            let length = fs::metadata(path).unwrap().len();
            assert_eq!(self.ours.stream_position().unwrap(), length);
        }
        self.ours.write_all(AFTER).unwrap();
        let flags = fcntl(&self.ours, FcntlArg::F_GETFL).unwrap();
        assert_eq!(flags, self.flags, "its flags are as they were");
        self.read();
        let end = self.ours.stream_position();
        drop(self.ours);
        match self.far {
            Far::File(path) => fs::read(path).unwrap(),
            Far::Device(path) => {
                let mut image = Vec::new();
                let device = File::open(path).unwrap();
                device.take(end.unwrap()).read_to_end(&mut image).unwrap();
                image
            }
            Far::Reader(thread, _) => thread.join().unwrap(),
        }
    }

    /// Whether the stream is a file.
    pub(crate) fn is_file(&self) -> bool {
        matches!(self.far, Far::File(_))
    }
}

fn reader(from: OwnedFd) -> Far {
    let (begin, begun): (Sender<()>, Receiver<()>) = mpsc::channel();
    let thread = thread::spawn(move || {
        let mut bytes = Vec::new();
        if begun.recv().is_ok() {
            File::from(from).read_to_end(&mut bytes).unwrap();
        }
        bytes
    });
    Far::Reader(thread, begin)
}

/// The libxc stream inside an image.
#[track_caller]
pub(crate) fn libxc(image: &[u8]) -> &[u8] {
    let rest = image.strip_prefix(BEFORE).unwrap();
    let rest = rest.strip_prefix(&LIBXC).unwrap();
    rest.strip_suffix(AFTER).unwrap()
}

/// The sender of the rest of a stream. Dropping it closes the stream.
pub(crate) struct Rest {
    sent: Receiver<()>,
    go: Sender<()>,
}

impl Rest {
    /// Waits until the first part has been sent, or cannot be.
    pub(crate) fn wait_until_sent(&mut self) {
        self.sent.recv().ok();
    }

    pub(crate) fn send_the_rest(self) {
        self.go.send(()).unwrap();
    }
}

/// The source of a restore: its reader gets the first `at_once` of `bytes` at once, and the rest
/// when the returned sender sends it. Returns the descriptor to pass on, and the sender.
pub(crate) fn source(
    kind: Kind,
    dir: &Path,
    bytes: Vec<u8>,
    at_once: usize,
) -> (OwnedFd, Option<Rest>) {
    let (ours, mut to): (OwnedFd, File) = match kind {
        Kind::File => {
            let path = dir.join("image");
            fs::write(&path, bytes).unwrap();
            return (File::open(path).unwrap().into(), None);
        }
        Kind::Pipe => {
            let (from, to) = io::pipe().unwrap();
            (from.into(), OwnedFd::from(to).into())
        }
        Kind::Socket => {
            let (from, to) = UnixStream::pair().unwrap();
            (from.into(), OwnedFd::from(to).into())
        }
    };
    let (go, gone) = mpsc::channel::<()>();
    let (has_sent, sent) = mpsc::channel::<()>();
    thread::spawn(move || {
        let (first, rest) = bytes.split_at(at_once.min(bytes.len()));
        // An emu-manager that has failed stops reading.
        if to.write_all(first).is_ok() {
            has_sent.send(()).ok();
            if gone.recv().is_ok() {
                to.write_all(rest).ok();
            }
        }
    });
    (ours, Some(Rest { sent, go }))
}

/// Opens a file with these flags.
pub(crate) fn opened(path: &Path, flags: OFlag) -> OwnedFd {
    let mode = nix::sys::stat::Mode::from_bits_truncate(0o600);
    nix::fcntl::open(path, flags | OFlag::O_CREAT, mode).unwrap()
}
