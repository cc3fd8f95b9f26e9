//! The program under the name `convert-legacy-stream`: it takes the arguments of Xen's script of
//! that name and writes the same bytes, so that libxl can start it instead
//! (`LIBXL_CONVERT_HELPER`).
//!
//! The script converts only the first checkpoint of a stream. So does this program, and it reads
//! nothing after it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom, Write as _};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser as _;
use xsr_format::legacy::{Checkpoints, Converted, LegacyOptions, LegacyReader, Target};
use xsr_format::read::ReadOptions;
use xsr_format::wrapper::xl::XlHeader;
use xsr_save_restore::storage::file::Inherited;
use xsr_save_restore::storage::{StorageCursor, file};

use super::pour;
use crate::args::images::{ScriptArgs, ScriptFormat};
use crate::exit::{self, Code};
use crate::output::{Existing, Output, OutputPlan, Sink};
use crate::terminal::Terminal;

/// The name under which the program does this.
pub(crate) const NAME: &str = "convert-legacy-stream";

/// Run with the process's arguments. The exit codes are the script's: 0 or 1.
pub(crate) fn main() -> ExitCode {
    let args = match ScriptArgs::try_parse() {
        Ok(args) => args,
        Err(e) => {
            return match exit::command_line(e) {
                Code::Fine => ExitCode::SUCCESS,
                _ => ExitCode::from(1),
            };
        }
    };
    let terminal = Terminal::new(u8::from(args.verbose), false);
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            terminal.error(&error);
            ExitCode::from(1)
        }
    }
}

fn run(args: &ScriptArgs) -> Result<()> {
    let input = open(&args.input).context("the input")?;
    let output = match args.output.parse::<u32>() {
        Ok(number) => {
            let file = inherited(number, OpenOptions::new().write(true));
            let file = file.with_context(|| format!("descriptor {number}"));
            file.and_then(|file| Output::of_descriptor(file, format!("descriptor {number}")))
        }
        Err(_) => Output::open(&OutputPlan {
            path: Path::new(&args.output),
            inputs: &[Path::new(&args.input)],
            existing: Existing::Replace,
            only_copy: false,
        }),
    };
    let output = output.context("the output")?;
    let ((), _) = output.fill(|sink| convert(args, &input, sink))?;
    Ok(())
}

fn convert(args: &ScriptArgs, input: &StorageCursor, sink: &mut Sink<'_>) -> Result<()> {
    let mut offset = 0;
    if args.xl {
        let header = XlHeader::read(&mut &*input, ReadOptions::default())?;
        offset = header.bytes();
        let header = match args.format {
            ScriptFormat::Libxc => header,
            ScriptFormat::Libxl => header.for_version_2(),
        };
        sink.write_all(&header.encode())?;
    }
    let options = LegacyOptions {
        lenient: false,
        offset,
        width: Some(args.width.into()),
        guest: Some(args.guest.into()),
        device_model: args.format == ScriptFormat::Libxl || !args.skip_qemu,
        checkpoints: Checkpoints::UpTo(1),
    };
    let target = match args.format {
        ScriptFormat::Libxc => Target::Libxc {
            device_model: !args.skip_qemu,
        },
        ScriptFormat::Libxl => Target::Libxl,
    };
    let reader = LegacyReader::new(input, options)?;
    let mut converted = Converted::new(reader, target, None)?;
    pour(&mut converted, sink)?;
    crate::peel::warn_of(converted.summary());
    Ok(())
}

/// Opens an input: a number is an inherited descriptor, as for the script; anything else is a file.
fn open(name: &str) -> Result<StorageCursor> {
    let opened = match name.parse::<u32>() {
        Ok(number) => {
            let own = format!("descriptor {number}");
            let file = inherited(number, OpenOptions::new().read(true));
            file::opened(file.with_context(|| own.clone())?, own)?
        }
        Err(_) => file::open(Path::new(name))?,
    };
    Ok(StorageCursor::new(opened)?)
}

/// The file or pipe of a descriptor. `/proc` opens the same pipe. It opens a file anew, so the file
/// offset is copied.
fn inherited(number: u32, options: &OpenOptions) -> Result<File> {
    match number {
        0 => return Ok(io::stdin().as_fd().try_clone_to_owned()?.into()),
        1 => return Ok(io::stdout().as_fd().try_clone_to_owned()?.into()),
        2 => return Ok(io::stderr().as_fd().try_clone_to_owned()?.into()),
        _ => {}
    }
    Inherited::of(number)?;
    let path = format!("/proc/self/fd/{number}");
    let mut options = options.clone();
    let mut file = options.create(false).truncate(false).open(path)?;
    if file.metadata()?.is_file() {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{number}"))?;
        let place = info
            .lines()
            .find_map(|line| line.strip_prefix("pos:"))
            .and_then(|place| place.trim().parse().ok())
            .context("the kernel does not report the position in the file")?;
        file.seek(SeekFrom::Start(place))?;
    }
    Ok(file)
}
