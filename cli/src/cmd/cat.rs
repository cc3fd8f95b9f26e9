//! `xsr cat`: the stream inside an image, byte for byte.
//!
//! The stream is read and checked as it goes through, because that is how its end is found.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read, Write};
use std::rc::Rc;

use anyhow::{Context as _, Error, Result};
use xsr_format::detect::Detected;
use xsr_format::read::ReadOptions;
use xsr_format::transcode::Layer;
use xsr_format::walk::{Content, Walk};

use super::convert::layer_of;
use crate::args::images::CatArgs;
use crate::exit::{BadUsage, Code};
use crate::file::Input;
use crate::output::{Existing, Output, Plan, Sink};

/// A file, and what has been read from it since somebody looked.
pub(super) struct Heard<'f> {
    file: &'f File,
    octets: Rc<RefCell<Vec<u8>>>,
}

impl<'f> Heard<'f> {
    /// Read from a file; what was read can be taken from the second.
    pub(super) fn new(file: &'f File) -> (Self, Rc<RefCell<Vec<u8>>>) {
        let octets = Rc::default();
        let heard = Self {
            file,
            octets: Rc::clone(&octets),
        };
        (heard, octets)
    }

    /// The file, for what nobody needs to hear.
    pub(super) fn file(&self) -> &'f File {
        self.file
    }
}

impl Read for Heard<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(room)?;
        if let Some(read) = room.get(..n) {
            self.octets.borrow_mut().extend_from_slice(read);
        }
        Ok(n)
    }
}

/// Write the stream inside an image.
pub(crate) fn run(args: &CatArgs) -> Result<Code> {
    let input = Input::open_as_it_is(&args.file)?;
    let output = Output::open(&Plan {
        path: &args.output,
        inputs: &[&args.file],
        existing: Existing::forced(args.overwrite.force),
        only_copy: false,
    })?;
    let input = input.unwrapped(args.lenient)?;
    output.fill(|sink| {
        let octets = cat(args, &input, sink)
            .map_err(|error| input.blame(error))
            .with_context(|| input.name.clone())?;
        input.finish(octets).with_context(|| input.name.clone())
    })?;
    Ok(Code::Fine)
}

fn cat(args: &CatArgs, input: &Input, sink: &mut Sink<'_>) -> Result<u64> {
    let options = ReadOptions {
        lenient: args.lenient,
        offset: 0,
    };
    let wanted = layer_of(args.layer);
    let (source, heard) = Heard::new(&input.file);
    let mut walk = Walk::open(source, options)?;
    let has = match walk.detected() {
        Detected::Xl => Layer::Xl,
        Detected::Libxl => Layer::Libxl,
        _ => Layer::Libxc,
    };
    if wanted > has {
        let why = "there is no such layer in the image: convert --to puts one around it";
        return Err(Error::new(BadUsage(why.to_owned())));
    }
    while let Some(step) = walk.next_step()? {
        let layer = match &step.content {
            Content::XlHeader(_) => Layer::Xl,
            Content::LibxlHeader(_) | Content::LibxlRecord(_) => Layer::Libxl,
            Content::Headers(..) | Content::PageData(_) | Content::Record(_) => Layer::Libxc,
        };
        let octets = heard.take();
        if layer <= wanted {
            sink.write_all(&octets)?;
        }
        if let Content::PageData(mut body) = step.content {
            let pages = body.pages_left();
            let copied = body.with_source(pages, |source, octets| {
                let copied = sink.copy(source.file, octets)?;
                match copied == octets {
                    true => Ok(()),
                    false => Err(io::ErrorKind::UnexpectedEof.into()),
                }
            });
            copied?;
        }
    }
    Ok(walk.offset())
}
