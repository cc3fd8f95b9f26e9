//! The text output of `xsr inspect`.

use std::io::{self, Write};

use xsr_format::record::RecordKind;

use super::facts::RecordFacts;
use super::report::{InspectReport, Row};
use crate::text::{Count, hex, pfn_range, shown, shown_value, size, wrapped};

/// Columns before the value in the parts without a table, before the type of a record, and before
/// the value of a field.
const VALUE: usize = 10;
const TYPE: usize = 29;
const FIELD: usize = 37;

/// Print a report. Where a line would have more than `width` columns, it is wrapped.
pub(crate) fn print(report: &InspectReport, width: usize, out: &mut dyn Write) -> io::Result<()> {
    let what = match (&report.xl, &report.libxl, &report.libxc) {
        (Some(_), _, _) => "xl image",
        (None, Some(_), _) => "libxl stream",
        (None, None, Some(_)) => "libxc stream",
        (None, None, None) => "no image",
    };
    write!(out, "{}: {what}", shown(&report.file))?;
    if report.bytes > 0 {
        write!(out, ", {}", size(report.bytes))?;
    }
    match &report.error {
        Some(error) => {
            writeln!(out, ", BAD: this is what could be read of it")?;
            writeln!(out, "  error: {error}")?;
        }
        None => writeln!(out)?,
    }
    for warning in &report.warnings {
        writeln!(out, "  warning: {warning}")?;
    }
    headers(report, width, out)?;
    guest(report, width, out)?;
    origin(report, out)?;
    host_uses(report, width, out)?;
    records(&report.records, width, out)?;
    if report.records_left_out > 0 {
        let more = Count(report.records_left_out, "more record");
        writeln!(out, "  {more}, left out")?;
    }
    context(report, out)?;
    params(report, out)?;
    fields(report, width, out)
}

fn host_uses(report: &InspectReport, width: usize, out: &mut dyn Write) -> io::Result<()> {
    let Some(xl) = report.xl.as_ref().filter(|xl| !xl.host_uses.is_empty()) else {
        return Ok(());
    };
    writeln!(out, "\nWhat a restore has the host do, as root")?;
    for one in &xl.host_uses {
        let (field, value) = (shown(&one.field), shown_value(&one.value));
        let line = format!("{} {value} ({field})", one.what);
        writeln!(out, "{}", wrapped("  ", &line, " ", "    ".len(), width))?;
    }
    if xl.host_uses_left_out > 0 {
        let more = Count(xl.host_uses_left_out, "more use");
        writeln!(out, "  {more}, left out")?;
    }
    Ok(())
}

fn headers(report: &InspectReport, width: usize, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "\nHeaders")?;
    for layer in &report.layers {
        writeln!(out, "  around  {layer}")?;
    }
    if let Some(layout) = &report.layout {
        writeln!(out, "{}", wrapped("  layout  ", layout, " ", VALUE, width))?;
    }
    for note in &report.notes {
        writeln!(out, "{}", wrapped("  note    ", note, " ", VALUE, width))?;
    }
    for left in &report.left_out {
        let (record, what, at) = (&left.record, left.what, left.offset);
        let bytes = Count(left.bytes, "byte");
        let beside =
            format!("{record}: {what}, {bytes} at {at:#x}; no image of xl has a place for it");
        writeln!(out, "{}", wrapped("  beside  ", &beside, " ", VALUE, width))?;
    }
    if let Some(xl) = &report.xl {
        let json = match (xl.config_bytes, xl.mandatory_flags & 1) {
            (0, _) => "no configuration".to_owned(),
            (bytes, 0) => format!("configuration in xl's own format, {bytes} bytes"),
            (bytes, _) => format!("JSON configuration of {bytes} bytes"),
        };
        let flags = xl.mandatory_flags;
        writeln!(
            out,
            "  xl      {} endian, flags {flags:#x}, {json}",
            xl.byte_order
        )?;
    }
    if let Some(libxl) = &report.libxl {
        let converted = match libxl.legacy_converted {
            true => ", converted from a legacy stream",
            false => "",
        };
        let (order, version) = (libxl.byte_order, libxl.version);
        writeln!(
            out,
            "  libxl   {order} endian, version {version}{converted}"
        )?;
    }
    if let Some(libxc) = &report.libxc {
        let (order, version) = (libxc.byte_order, libxc.version);
        let saver = match libxc.xen_major {
            0 => "converted from a legacy stream".to_owned(),
            major => format!("saved by Xen {major}.{}", libxc.xen_minor),
        };
        let guest = &libxc.guest_type;
        writeln!(
            out,
            "  libxc   {order} endian, version {version}, {guest}, {saver}"
        )?;
    }
    Ok(())
}

fn guest(report: &InspectReport, width: usize, out: &mut dyn Write) -> io::Result<()> {
    let guest = &report.guest;
    writeln!(out, "\nGuest")?;
    if let Some(name) = &guest.name {
        writeln!(out, "  name    {}", shown_value(name))?;
    }
    if let Some(uuid) = &guest.uuid {
        writeln!(out, "  uuid    {}", shown_value(uuid))?;
    }
    if let Some(kind) = guest.kind {
        let bits = guest
            .bits
            .map_or_else(String::new, |b| format!(", {b}-bit"));
        writeln!(out, "  kind    {}{bits}", kind.to_uppercase())?;
    }
    match guest.max_vcpus {
        Some(max) if max != guest.vcpus => {
            writeln!(out, "  vcpus   {}, configured {max}", guest.vcpus)?;
        }
        _ => writeln!(out, "  vcpus   {}", guest.vcpus)?,
    }
    let pages = &report.pages;
    write!(out, "  memory  {} in ", size(guest.populated_kib << 10))?;
    write!(out, "{}", Count(pages.populated, "page"))?;
    match guest.max_memory_kib {
        Some(kib) => writeln!(out, ", configured {}", size(kib << 10))?,
        None => writeln!(out)?,
    }
    if let Some(last) = pages.last_pfn {
        let mut pfns = format!("{} up to {}:", pages.pfns, hex(last));
        for (i, fact) in pages.types.iter().enumerate() {
            let separator = if i == 0 { "" } else { "," };
            pfns.push_str(&format!("{separator} {} {}", fact.pages, fact.name));
        }
        writeln!(out, "{}", wrapped("  pfns    ", &pfns, ", ", VALUE, width))?;
    }
    Ok(())
}

/// What another toolstack says about the domain.
fn origin(report: &InspectReport, out: &mut dyn Write) -> io::Result<()> {
    let Some(origin) = &report.origin else {
        return Ok(());
    };
    let bytes = Count(origin.text.len(), "byte");
    let words = origin.words();
    writeln!(
        out,
        "\nSaid by {words} ({bytes}; xsr cat --layer config writes it)"
    )?;
    if let Some(why) = &origin.error {
        writeln!(out, "  could not be understood: it {}", why.escape_debug())?;
    }
    for device in &origin.devices {
        writeln!(out, "  device  {}", device.escape_debug())?;
    }
    for setting in &origin.settings {
        writeln!(out, "  not carried over: {}", setting.escape_debug())?;
    }
    Ok(())
}

fn records(rows: &[Row], width: usize, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "\nRecords")?;
    let title = ("offset", "stream", "no.", "type", "bytes");
    let (offset, stream, number, kind, bytes) = title;
    writeln!(
        out,
        "  {offset:>12} {stream} {number:>6} {kind:<22} {bytes:>10}"
    )?;
    for row in rows {
        let (number, kind) = match &row.facts {
            RecordFacts::Pages(pages) if pages.records() > 1 => (
                format!("{}", row.index),
                format!("{} × {}", pages.records(), row.kind),
            ),
            _ => (row.index.to_string(), row.kind.clone()),
        };
        let line = format!(
            "  {:>#12x} {:<6} {number:>6} {kind:<22} {:>10}  ",
            row.offset, row.stream, row.bytes
        );
        let facts = row.facts.to_string();
        // Facts that do not fit stand together below the type, not partly beside it.
        let line = match line.chars().count() + facts.chars().count() > width {
            true => {
                let indent = " ".repeat(TYPE);
                let facts = wrapped(&indent, &facts, ", ", TYPE, width);
                format!("{}\n{facts}", line.trim_end())
            }
            false => line + &facts,
        };
        writeln!(out, "{}", line.trim_end())?;
        if let RecordFacts::Pages(pages) = &row.facts {
            for run in pages.runs.iter().flatten() {
                let range = pfn_range(run.first_pfn, run.last_pfn);
                writeln!(out, "{:>24} {range:<26} {}", "", run.name)?;
            }
        }
    }
    Ok(())
}

fn context(report: &InspectReport, out: &mut dyn Write) -> io::Result<()> {
    if report.hvm_context.is_empty() {
        return Ok(());
    }
    writeln!(out, "\n{}", RecordKind::HVM_CONTEXT)?;
    for entry in &report.hvm_context {
        let name = match entry.name {
            Some(name) => name.to_owned(),
            None => format!("unknown type {}", entry.code),
        };
        let (instance, bytes) = (entry.instance, Count(entry.bytes, "byte"));
        writeln!(out, "  {name:<18} instance {instance:<3} {bytes}")?;
    }
    Ok(())
}

fn params(report: &InspectReport, out: &mut dyn Write) -> io::Result<()> {
    if report.hvm_params.is_empty() {
        return Ok(());
    }
    writeln!(out, "\n{}", RecordKind::HVM_PARAMS)?;
    for param in &report.hvm_params {
        let name = match param.name {
            Some(name) => name.to_owned(),
            None => format!("unknown parameter {}", param.index),
        };
        writeln!(out, "  {name:<24} {}", hex(param.value))?;
    }
    Ok(())
}

fn fields(report: &InspectReport, width: usize, out: &mut dyn Write) -> io::Result<()> {
    if report.fields.is_empty() {
        return Ok(());
    }
    writeln!(out, "\nFields (those that are zero are left out)")?;
    for named in &report.fields {
        match named.about {
            Some(about) => writeln!(out, "  {}: {about}", named.of)?,
            None => writeln!(out, "  {}", named.of)?,
        }
        for field in &named.fields {
            let name = format!("    {:<32} ", field.name);
            let value = field.value.to_string();
            let separator = match value.contains(", ") {
                true => ", ",
                false => " ",
            };
            writeln!(out, "{}", wrapped(&name, &value, separator, FIELD, width))?;
        }
    }
    if let Some(config) = report.xl.as_ref().and_then(|xl| xl.config.as_ref()) {
        writeln!(out, "\nConfiguration")?;
        for line in format!("{config:#}").lines() {
            writeln!(out, "  {line}")?;
        }
    }
    Ok(())
}
