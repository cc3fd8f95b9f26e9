//! The text output of `xsr diff`: grouped by part of the image, ranges instead of pages, and short
//! enough to read.

use std::io::{self, Write};

use super::difference::{Difference, LeftOut, Section, What};
use super::expected::without_indices;
use crate::text::{Count, pfn_range, shown, shown_value, wrapped};

/// The most lines of one part.
const MOST: usize = 24;

/// The names of the two images, and the differences.
#[derive(Debug)]
pub(crate) struct Summary<'a> {
    pub(crate) a: &'a str,
    pub(crate) b: &'a str,
    pub(crate) differences: &'a [Difference],
    pub(crate) left_out: &'a [LeftOut],
    pub(crate) pages_compared: u64,
}

/// Print the differences, in lines of at most `width` columns where their values allow that.
pub(crate) fn print(summary: &Summary<'_>, width: usize, out: &mut dyn Write) -> io::Result<()> {
    let (expected, real): (Vec<_>, Vec<_>) = summary
        .differences
        .iter()
        .partition(|d| d.expected.is_some());
    for group in real.chunk_by(|a, b| a.section == b.section) {
        print_group(group, summary.left_out, width, out)?;
    }
    if !expected.is_empty() {
        writeln!(out, "expected after a restore")?;
        print_expected(&expected, summary.left_out, width, out)?;
    }
    let (a, b) = (shown(summary.a), shown(summary.b));
    let compared = Count(summary.pages_compared, "page");
    let unlisted = summary.left_out.iter().filter(|l| l.expected.is_none());
    let unlisted: u64 = unlisted.map(|l| l.differences).sum();
    match (real.len() as u64 + unlisted, expected.len()) {
        (0, 0) => writeln!(out, "{a} and {b} do not differ ({compared} compared)"),
        (0, _) => writeln!(
            out,
            "{a} and {b} differ in nothing else ({compared} compared)"
        ),
        (n, _) => writeln!(
            out,
            "{a} and {b} differ: {} ({compared} compared)",
            Count(n, "difference")
        ),
    }
}

fn print_group(
    group: &[&Difference],
    left_out: &[LeftOut],
    columns: usize,
    out: &mut dyn Write,
) -> io::Result<()> {
    let Some(section) = group.first().map(|d| d.section) else {
        return Ok(());
    };
    let (unlisted, unlisted_pages) = unlisted(left_out, section, None);
    match pages(group) + unlisted_pages {
        0 => writeln!(out, "{}", section.title())?,
        pages => writeln!(out, "{}: {}", section.title(), Count(pages, "page"))?,
    }
    let width = group
        .iter()
        .map(|d| name(&d.what).chars().count())
        .max()
        .unwrap_or(0)
        .min(40);
    for difference in group.iter().take(MOST) {
        let name = name(&difference.what);
        let Some((a, b)) = values(&difference.what) else {
            writeln!(out, "  {name}")?;
            continue;
        };
        let line = format!("  {name:<width$}  {a} → {b}");
        match line.chars().count() > columns {
            // Each value on its own line, whole: they are compared by eye.
            true => writeln!(out, "  {name:<width$}  {a}\n  {:<width$}  → {b}", "")?,
            false => writeln!(out, "{line}")?,
        }
    }
    let more = group.len().saturating_sub(MOST) as u64 + unlisted;
    match unlisted {
        _ if more == 0 => {}
        0 => writeln!(out, "  … and {more} more (--json has all of them)")?,
        _ => writeln!(out, "  … and {more} more (--json has {})", group.len())?,
    }
    Ok(())
}

/// Expected differences by reason: how many, and where.
fn print_expected(
    expected: &[&Difference],
    left_out: &[LeftOut],
    width: usize,
    out: &mut dyn Write,
) -> io::Result<()> {
    let mut groups: Vec<(Section, &str, Vec<&Difference>)> = Vec::new();
    for difference in expected {
        let reason = difference.expected.unwrap_or_default();
        match groups
            .iter_mut()
            .find(|(section, r, _)| (*section, *r) == (difference.section, reason))
        {
            Some((_, _, group)) => group.push(difference),
            None => groups.push((difference.section, reason, vec![difference])),
        }
    }
    for (section, reason, group) in groups {
        let (unlisted, unlisted_pages) = unlisted(left_out, section, Some(reason));
        let names = names(&group, unlisted);
        match pages(&group) + unlisted_pages {
            0 => {
                let head = format!("  {} ", section.title());
                writeln!(out, "{}", wrapped(&head, &names, ", ", 4, width))?;
            }
            pages => {
                let head = format!("  {} of {}: ", section.title(), Count(pages, "page"));
                writeln!(out, "{}", wrapped(&head, &names, ", ", 4, width))?;
            }
        }
        writeln!(out, "    {reason}")?;
    }
    Ok(())
}

/// The subjects of a group: a field once for all its indices, and the first few ranges.
fn names(group: &[&Difference], unlisted: u64) -> String {
    const SHOWN: usize = 6;
    let mut names: Vec<(String, usize)> = Vec::new();
    for difference in group {
        let name = match &difference.what {
            What::Field { field, .. } => without_indices(field),
            other => name(other),
        };
        match names.last_mut() {
            Some((last, times)) if *last == name => *times += 1,
            _ => names.push((name, 1)),
        }
    }
    let more = names.len().saturating_sub(SHOWN) as u64 + unlisted;
    let mut shown: Vec<String> = names
        .into_iter()
        .take(SHOWN)
        .map(|(name, times)| match times {
            1 => name,
            _ => format!("{name} × {times}"),
        })
        .collect();
    if more > 0 {
        shown.push(format!("and {more} more"));
    }
    shown.join(", ")
}

/// The number of unlisted differences of a part, and of the pages that they affect.
fn unlisted(left_out: &[LeftOut], section: Section, expected: Option<&str>) -> (u64, u64) {
    let same = |l: &&LeftOut| l.section == section && l.expected == expected;
    let left_out = left_out.iter().find(same);
    left_out.map_or((0, 0), |l| (l.differences, l.pages))
}

fn pages(group: &[&Difference]) -> u64 {
    group.iter().filter_map(|d| d.what.pages()).sum()
}

fn name(what: &What) -> String {
    match what {
        What::Field { field, .. } => shown_value(field),
        What::Types {
            first_pfn,
            last_pfn,
            ..
        }
        | What::Contents {
            first_pfn,
            last_pfn,
        } => pfn_range(*first_pfn, *last_pfn),
    }
}

/// The two values, unless the contents of pages differ.
fn values(what: &What) -> Option<(String, String)> {
    match what {
        What::Field { a, b, .. } => {
            let value = |value: &Option<String>| {
                let shown = value.as_deref().map(shown_value);
                shown.unwrap_or_else(|| "absent".into())
            };
            Some((value(a), value(b)))
        }
        What::Types { a, b, .. } => {
            let name = |t: &Option<xsr_format::frame::PageType>| {
                t.map_or_else(|| "not mentioned".to_owned(), |t| t.name().to_owned())
            };
            Some((name(a), name(b)))
        }
        What::Contents { .. } => None,
    }
}
