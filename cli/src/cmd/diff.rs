//! `xsr diff`: how two images differ in meaning.
//!
//! Each image is read once for everything except page contents. Those are then compared pfn by pfn,
//! from the last version of each in the file, so that neither image is ever held in memory.

mod compare;
mod difference;
mod expected;
mod image;
mod pages;
mod print;

use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Serialize;

use self::compare::Found;
use self::difference::{Difference, LeftOut};
use self::expected::Expected;
use self::image::Image;
use crate::args::DiffArgs;
use crate::backend::phase;
use crate::exit::Code;
use crate::image::Reading;
use crate::stdout::Results;
use crate::terminal::Terminal;

/// What `--json` prints (docs/json.md).
#[derive(Debug, Serialize)]
struct DiffReport<'a> {
    a: &'a str,
    b: &'a str,
    /// Whether there are unexpected differences.
    differ: bool,
    pages_compared: u64,
    differences: &'a [Difference],
    /// Differences beyond those listed.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    left_out: &'a [LeftOut],
}

/// Compare two images.
pub(crate) fn run(args: &DiffArgs, terminal: &Terminal) -> Result<Code> {
    let reading = Reading {
        lenient: args.lenient,
    };
    let a = Image::read(&args.a, reading, terminal)?;
    let b = Image::read(&args.b, reading, terminal)?;
    let comparison = compare(&a, &b, args.after_restore, terminal)?;
    let differences = &comparison.differences;
    let differ = comparison.differ();
    let mut out = Results::new();
    if args.json {
        out.json(&DiffReport {
            a: &a.input.name,
            b: &b.input.name,
            differ,
            pages_compared: comparison.pages_compared,
            differences,
            left_out: &comparison.left_out,
        })?;
    } else {
        let summary = print::Summary {
            a: &a.input.name,
            b: &b.input.name,
            differences,
            left_out: &comparison.left_out,
            pages_compared: comparison.pages_compared,
        };
        print::print(&summary, out.width(), &mut out)?;
    }
    out.finish()?;
    Ok(match differ {
        true => Code::Failed,
        false => Code::Fine,
    })
}

/// Compare an image with one that was saved from a domain restored from it.
pub(crate) fn files(a: &Path, b: &Path, terminal: &Terminal) -> Result<Comparison> {
    let reading = Reading { lenient: false };
    let a = Image::read(a, reading, terminal)?;
    let b = Image::read(b, reading, terminal)?;
    compare(&a, &b, true, terminal)
}

/// The result of a comparison.
#[derive(Debug)]
pub(crate) struct Comparison {
    differences: Vec<Difference>,
    left_out: Vec<LeftOut>,
    /// Pages whose contents were compared.
    pub(crate) pages_compared: u64,
}

impl Comparison {
    /// Whether there are unexpected differences.
    pub(crate) fn differ(&self) -> bool {
        self.differences.iter().any(|d| d.expected.is_none())
            || self.left_out.iter().any(|l| l.expected.is_none())
    }
}

/// Compare two images. With `after_restore`, what a restore rewrites is expected.
fn compare(a: &Image, b: &Image, after_restore: bool, terminal: &Terminal) -> Result<Comparison> {
    let mut found = Found::new(after_restore.then(|| Expected::new(a, b)));
    compare::compare(a, b, &mut found)?;
    let total = 2 * 4096 * a.map.populated().min(b.map.populated());
    let bar = terminal.progress("comparing");
    let mut done = 0;
    let start_info = a.start_info().filter(|pfn| Some(*pfn) == b.start_info());
    let start_info = start_info.map(|pfn| pfn.0);
    let pages_compared = pages::compare(
        a.pages(),
        b.pages(),
        &mut |bytes| {
            phase("pages-compared");
            done += 2 * bytes;
            bar.bytes(done, Some(total));
        },
        &mut |difference| compare::page(difference, start_info, &mut found),
    )
    .with_context(|| format!("comparing {} and {}", a.input.name, b.input.name))?;
    drop(bar);
    let (differences, left_out) = found.finish();
    Ok(Comparison {
        differences,
        left_out,
        pages_compared,
    })
}
