//! `xsr edit`: replaces the configuration in an xl image, and drops or adds optional records. The
//! guest's memory and state are copied byte for byte.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context as _, Error, Result};
use serde::Serialize;
use serde_json::Value;
use serde_json::value::RawValue;
use xsr_format::byte_order::ByteOrder;
use xsr_format::detect::Detected;
use xsr_format::read::{EndedAfter, ReadOptions};
use xsr_format::record::RecordKind;
use xsr_format::walk::{Content, Walk};
use xsr_format::wrapper::libxl::LibxlRecord;
use xsr_format::wrapper::xl::XlHeader;
use xsr_format::write::append_record;

use super::cat::{Heard, without_pads};
use crate::args::images::EditArgs;
use crate::config::{self, Config};
use crate::exit::{BadImage, BadUsage, Code};
use crate::file::Input;
use crate::mapped;
use crate::origin::{self, Origin, with_setting};
use crate::output::{Existing, Output, OutputPlan, Sink};
use crate::stdout::report;
use crate::terminal::Terminal;
use crate::text::Count;

/// Edit an image.
pub(crate) fn run(args: &EditArgs, terminal: &Terminal) -> Result<Code> {
    check(args)?;
    let input = Input::open_as_it_is(&args.file)?;
    let mut inputs = vec![args.file.as_path()];
    inputs.extend(args.config.as_deref());
    inputs.extend(args.add.iter().map(|(_, path)| path.as_path()));
    let output = Output::open(&OutputPlan {
        path: &args.output,
        inputs: &inputs,
        existing: Existing::forced(args.overwrite.force),
        only_copy: false,
    })?;
    output.check_json(args.json)?;
    let name = output.name().to_owned();
    let input = input.unwrapped(args.lenient)?;
    refuse_mapped(&input, args.lenient)?;
    let bar = input.follow(terminal, "editing");
    let (dropped, bytes) = output.fill(|sink| {
        edit(args, &input, sink)
            .map_err(|error| input.blame(error))
            .with_context(|| format!("editing {}", input.name))
    })?;
    drop(bar);
    let done = format!(
        "{name}: {} dropped, {} added{}",
        Count(dropped, "optional record"),
        args.add.len(),
        match changes_configuration(args) {
            true => ", configuration changed",
            false => "",
        }
    );
    terminal.note(&done);
    if args.json {
        let document = EditReport {
            file: &input.name,
            dropped,
            added: args.add.len(),
            configuration_changed: changes_configuration(args),
            bytes,
        };
        report(terminal, &done, &document);
    }
    Ok(Code::Fine)
}

/// What `--json` prints (docs/json.md).
#[derive(Debug, Serialize)]
struct EditReport<'a> {
    file: &'a str,
    /// Optional records that were dropped, and added.
    dropped: u64,
    added: usize,
    configuration_changed: bool,
    bytes: u64,
}

fn changes_configuration(args: &EditArgs) -> bool {
    args.name.is_some() || args.uuid.is_some() || args.config.is_some()
}

/// Refuses a mapped image, whose index would not fit the edited image.
fn refuse_mapped(input: &Input, lenient: bool) -> Result<()> {
    let why = match mapped::index_of(input, lenient) {
        Ok(None) => return Ok(()),
        Ok(Some(_)) => "its index would not fit the edited image",
        Err(_) => "and incomplete or damaged: xsr verify says how",
    };
    Err(Error::new(BadUsage(format!(
        "{}: the image is mapped, {why}; xsr convert --layout stream makes one that can be edited, \
         and xsr convert --layout mapped maps that again",
        input.name
    ))))
}

/// Write the edited image. Returns the number of records dropped.
fn edit(args: &EditArgs, input: &Input, sink: &mut Sink<'_>) -> Result<u64> {
    let options = ReadOptions {
        lenient: args.lenient,
        offset: 0,
    };
    let additions = additions(args)?;
    let wants_header = changes_configuration(args);
    let (source, heard) = Heard::new(&input.image);
    let mut walk = Walk::open(source, options)?;
    if wants_header && walk.detected() != Detected::Xl {
        let why = "the image has no xl header, in which name, UUID and configuration are: \
                   xsr convert --to xl puts one around it";
        return Err(Error::new(BadUsage(why.to_owned())));
    }
    let mut dropped = 0_u64;
    let mut added = false;
    while let Some(step) = walk.next_step()? {
        let raw = heard.take();
        match &step.content {
            Content::Headers(image, _) if image.order == ByteOrder::Big && !args.add.is_empty() => {
                let why = "records can be added to little-endian streams only: convert it first";
                return Err(Error::new(BadUsage(why.to_owned())));
            }
            Content::XlHeader(header) if wants_header => {
                sink.write_all(&edited(args, header)?.encode())?;
            }
            Content::Record(record)
                if record.kind.is_optional() && args.drop.contains(&record.kind.0) =>
            {
                dropped += 1;
            }
            Content::LibxlRecord(LibxlRecord::Optional { kind, .. })
                if args.drop.contains(&kind.0) =>
            {
                dropped += 1;
            }
            Content::Record(record) => {
                // An optional record may be anywhere; at this point a reader knows all other
                // records.
                if record.kind == RecordKind::END && !added {
                    sink.write_all(&additions)?;
                    added = true;
                }
                raw.write(&step.content, sink)?;
            }
            Content::PageData(body) => match without_pads(body)? {
                Some(bytes) => sink.write_all(&bytes)?,
                None => raw.write(&step.content, sink)?,
            },
            _ => raw.write(&step.content, sink)?,
        }
        if let Content::PageData(mut body) = step.content {
            let pages = body.pages_left();
            body.with_source(pages, |source, bytes| {
                let copied = sink.copy(source.image(), bytes)?;
                match copied == bytes {
                    true => Ok(()),
                    false => Err(EndedAfter(copied).into()),
                }
            })?;
        }
    }
    input.finish(walk.offset())?;
    origin::warn_of_losses(input, walk.detected() == Detected::Xl);
    let absent = !args.drop.is_empty() && dropped == 0;
    if absent {
        tracing::warn!("the image has no optional record of a type that was to be dropped");
    }
    Ok(dropped)
}

/// Checks the command line: a name or UUID that no domain can have, a file that is not a
/// configuration.
fn check(args: &EditArgs) -> Result<()> {
    let usage = |why: String| Err(Error::new(BadUsage(why)));
    if let Some(name) = &args.name
        && let Some(why) = config::wrong_with_name(name)
    {
        return usage(format!("--name {name:?}: {why}"));
    }
    if let Some(uuid) = &args.uuid
        && let Some(why) = config::wrong_with_uuid(uuid)
    {
        return usage(format!("--uuid {uuid:?}: {why}"));
    }
    if let Some(path) = &args.config {
        let text = configuration(path)?;
        let config = Config::parse(&text).map_err(|e| config::not_libxls(path, &text, &e))?;
        let name = args.name.is_none().then_some(&config.name);
        let name = name.and_then(|name| Some((name, config::wrong_with_name(name)?)));
        let uuid = config.uuid.as_ref().filter(|_| args.uuid.is_none());
        let uuid = uuid.and_then(|uuid| Some((uuid, config::wrong_with_uuid(uuid)?)));
        for (key, wrong) in [("name", name), ("uuid", uuid)] {
            if let Some((value, why)) = wrong {
                return usage(format!("{}: c_info.{key} {value:?}: {why}", path.display()));
            }
        }
    }
    Ok(())
}

/// The text of a configuration file.
fn configuration(path: &Path) -> Result<String> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    Ok(text.trim_end_matches('\0').to_owned())
}

/// The records to add to the libxc stream, little endian, padded.
fn additions(args: &EditArgs) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    for (kind, path) in &args.add {
        let body = std::fs::read(path).with_context(|| path.display().to_string())?;
        append_record(&mut out, RecordKind(*kind), &body)
            .with_context(|| path.display().to_string())?;
    }
    Ok(out)
}

/// The header with the changes of the command line.
fn edited(args: &EditArgs, header: &XlHeader) -> Result<XlHeader> {
    let bad = |what: &str| Error::new(BadImage(what.to_owned()));
    let mut json = match &args.config {
        Some(path) => configuration(path)?,
        None => match header.json().map_err(|e| bad(&e.to_string()))? {
            Some(json) => json.to_owned(),
            None => return edited_text(args, header),
        },
    };
    for (key, value) in [("name", &args.name), ("uuid", &args.uuid)] {
        if let Some(value) = value {
            json = replaced(&json, key, value)?;
        }
    }
    Config::parse(&json)?;
    header.with_json(&json).map_err(|e| bad(&e.to_string()))
}

/// The same for a header with the text of xl of Xen 4.1 to 4.4.
fn edited_text(args: &EditArgs, header: &XlHeader) -> Result<XlHeader> {
    let bad = |what: &str| Error::new(BadImage(what.to_owned()));
    let Some(origin) = Origin::of_xl(header) else {
        return Err(bad(
            "there is no configuration in the xl header: give one with --config",
        ));
    };
    if let Some(why) = &origin.error {
        let what = format!("the configuration in the xl header could not be understood: {why}");
        return Err(bad(&what));
    }
    let mut text = origin.text;
    for (key, value) in [("name", &args.name), ("uuid", &args.uuid)] {
        if let Some(value) = value {
            text = with_setting(&text, key, value);
        }
    }
    header.with_text(&text).map_err(|e| bad(&e.to_string()))
}

/// The text with another value for a key of `c_info`. The rest stays as it is, because libxl's keys
/// are in a fixed order.
fn replaced(json: &str, key: &str, value: &str) -> Result<String> {
    // If a key occurs twice, the last one counts, as in every other command.
    type Members<'j> = BTreeMap<String, &'j RawValue>;
    let missing = || format!("the configuration has no c_info.{key}");
    let members: Members<'_> = serde_json::from_str(json).context("the configuration")?;
    let c_info = members.get("c_info").with_context(missing)?.get();
    let members: Members<'_> = serde_json::from_str(c_info).context("c_info")?;
    let old = members.get(key).with_context(missing)?.get();
    if !old.starts_with('"') {
        return Err(Error::msg(missing()));
    }
    // `old` borrows from `json`, so the difference of their addresses is its offset.
    let start = old.as_ptr().addr() - json.as_ptr().addr();
    let end = start + old.len();
    Ok(format!(
        "{}{}{}",
        &json[..start],
        Value::from(value),
        &json[end..]
    ))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn only_the_value_in_c_info_is_replaced() {
        let json = r#"{"a":[{"name":"web"}], "name" : "web",
            "c_info" : { "x":{"name":"web"}, "name" : "w\u0065b" , "uuid":"u"},"b":{"name":"web"}}"#;
        let expected = r#"{"a":[{"name":"web"}], "name" : "web",
            "c_info" : { "x":{"name":"web"}, "name" : "d\"b" , "uuid":"u"},"b":{"name":"web"}}"#;
        assert_eq!(replaced(json, "name", "d\"b").unwrap(), expected);
    }

    #[test]
    fn the_last_of_two_keys_is_the_one_that_counts() {
        let json = r#"{"c_info":{"name":"a"},"c_info":{"name":"b","name":"c"}}"#;
        let expected = r#"{"c_info":{"name":"a"},"c_info":{"name":"b","name":"new"}}"#;
        assert_eq!(replaced(json, "name", "new").unwrap(), expected);
    }

    #[test]
    fn a_name_that_is_missing_or_no_text_is_said() {
        for json in ["{}", r#"{"c_info":{}}"#, r#"{"c_info":{"name":1}}"#] {
            let error = format!("{:#}", replaced(json, "name", "new").unwrap_err());
            assert!(error.contains("no c_info.name"), "{json}: {error}");
        }
    }

    /// The longest configuration that is parsed, full of the key's name. This once took time
    /// quadratic in their number: minutes.
    #[test]
    fn many_of_the_key_take_no_longer() {
        let decoys = vec![r#"{"name":"evil"}"#; 60_000].join(",");
        let json = format!(r#"{{"a":[{decoys}],"c_info":{{"name":"evil"}}}}"#);
        let before = Instant::now();
        let new = replaced(&json, "name", "good").unwrap();
        assert!(new.ends_with(r#""c_info":{"name":"good"}}"#));
        let took = before.elapsed();
        assert!(took < Duration::from_secs(10), "{took:?}");
    }
}
