//! `xsr cat`: the stream inside an image, to stdout, octet for octet.
//!
//! The stream is read and checked as it goes through, because that is how its end is found.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::rc::Rc;

use anyhow::{Context as _, Error, Result};
use xsr_format::detect::Detected;
use xsr_format::read::ReadOptions;
use xsr_format::transcode::Layer;
use xsr_format::walk::{Content, Walk};

use super::convert::layer_of;
use crate::args::images::CatArgs;
use crate::exit::{BadUsage, Code};
use crate::file::{Input, Output};

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

/// Write the stream inside an image to stdout.
pub(crate) fn run(args: &CatArgs) -> Result<Code> {
    let input = Input::open(&args.file, args.lenient)?;
    let output = Output::create(Path::new("-"))?;
    let octets = cat(args, &input, &mut output.file())
        .map_err(|error| input.blame(error))
        .with_context(|| input.name.clone())?;
    input.finish(octets).with_context(|| input.name.clone())?;
    Ok(Code::Fine)
}

fn cat(args: &CatArgs, input: &Input, sink: &mut &File) -> Result<u64> {
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
            sink.write_all(&octets).context("writing to stdout")?;
        }
        if let Content::PageData(mut body) = step.content {
            let pages = body.pages_left();
            let copied = body.with_source(pages, |source, octets| {
                let copied = io::copy(&mut source.file.take(octets), sink)?;
                match copied == octets {
                    true => Ok(()),
                    false => Err(io::ErrorKind::UnexpectedEof.into()),
                }
            });
            copied?;
        }
    }
    sink.flush()?;
    Ok(walk.offset())
}
