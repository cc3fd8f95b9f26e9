//! The command line that xenopsd gives to an emu-manager.
//!
//! Options have one dash or two, and each has a value (`-domid 7`, `-domid=7`), except `-debug`,
//! whose value may be missing. Their order is not fixed.

use std::str::FromStr;

use xsr_xen_backend::DomId;

/// The text that `-help` prints.
pub(crate) const HELP: &str = "\
usage: xsr-emu-manager -controloutfd N -controlinfd N -fd N -domid N
                       -mode hvm_save|save|hvm_restore|restore
                       [-live true] [-dm qemu] [-store_port N -console_port N] [-debug true]
       xsr-emu-manager -supports FEATURE
       xsr-emu-manager -help | -version
Stands in for xapi's emu-manager: XCP-ng and XenServer suspend, resume and migrate a VM with
xsr's engine. xenopsd starts it for a VM whose platform map names it:

  xe vm-param-set uuid=UUID platform:emu-manager=xsr
  xe vm-param-remove uuid=UUID param-name=platform param-key=emu-manager

It must be installed as /usr/lib/xapi/alternatives/emu-manager/xsr.";

/// The request in the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// A save or a restore.
    Work(Args),
    /// Text for the user, or the answer to `-supports`.
    Print(String),
}

/// A save or a restore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Args {
    /// The descriptor for lines to xenopsd.
    pub(crate) control_out: i32,
    /// The descriptor for lines from xenopsd.
    pub(crate) control_in: i32,
    /// The descriptor of the suspend image or migration stream.
    pub(crate) stream: i32,
    pub(crate) domid: DomId,
    pub(crate) mode: Mode,
    /// Whether the mode names a translated guest (HVM and PVH), not a PV guest.
    pub(crate) translated: bool,
    /// Whether the domain has a qemu, whose dirty log must be switched on.
    pub(crate) qemu: bool,
    /// Whether the domain has a vGPU.
    pub(crate) vgpu: bool,
    /// Whether xenopsd wants compression if both ends support it.
    pub(crate) compress: bool,
    /// The NUMA node that xenopsd has planned for the memory.
    pub(crate) node: Option<String>,
    pub(crate) debug: bool,
}

/// What to do with the domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Save it.
    Save {
        /// Whether the guest runs while its memory is sent.
        live: bool,
    },
    /// Restore it. These event channels are the guest's ends of its two rings.
    Restore { store_port: u32, console_port: u32 },
}

impl Args {
    /// The name of the work, for messages.
    pub(crate) fn what(&self) -> &'static str {
        match self.mode {
            Mode::Save { .. } => "save",
            Mode::Restore { .. } => "restore",
        }
    }
}

/// The values of the options, as given.
#[derive(Debug, Default)]
struct Given {
    control_out: Option<String>,
    control_in: Option<String>,
    stream: Option<String>,
    domid: Option<String>,
    mode: Option<String>,
    live: Option<String>,
    store_port: Option<String>,
    console_port: Option<String>,
    compress: Option<String>,
    node: Option<String>,
    dm: Vec<String>,
    debug: bool,
    print: Option<String>,
}

/// Parses the words after the program's name.
///
/// # Errors
///
/// What is wrong, in one line.
pub(crate) fn parse(words: &[String]) -> Result<Request, String> {
    let given = read(words)?;
    if let Some(text) = given.print {
        return Ok(Request::Print(text));
    }
    let live = flag("-live", given.live.as_deref())?;
    let mode = given.mode.ok_or("-mode is missing")?;
    let (translated, save) = match mode.as_str() {
        "hvm_save" => (true, true),
        "save" => (false, true),
        "hvm_restore" => (true, false),
        "restore" => (false, false),
        _ => {
            return Err(format!(
                "-mode is {mode:?}, expected hvm_save, save, hvm_restore or restore"
            ));
        }
    };
    let store_port = optional("-store_port", given.store_port)?;
    let console_port = optional("-console_port", given.console_port)?;
    let mode = match save {
        true => Mode::Save { live },
        false => Mode::Restore {
            store_port: store_port.ok_or("-store_port is missing")?,
            console_port: console_port.ok_or("-console_port is missing")?,
        },
    };
    let (mut qemu, mut vgpu) = (false, false);
    for dm in given.dm {
        match dm.split_once(':') {
            None if dm == "qemu" => qemu = true,
            Some(("vgpu", fd)) => {
                let _: i32 = number("-dm vgpu:", fd)?;
                vgpu = true;
            }
            _ => return Err(format!("-dm is {dm:?}, expected qemu or vgpu:N")),
        }
    }
    Ok(Request::Work(Args {
        control_out: required("-controloutfd", given.control_out)?,
        control_in: required("-controlinfd", given.control_in)?,
        stream: required("-fd", given.stream)?,
        domid: DomId(required("-domid", given.domid)?),
        mode,
        translated,
        qemu,
        vgpu,
        compress: flag("-compress", given.compress.as_deref())?,
        node: given.node,
        debug: given.debug,
    }))
}

/// The descriptor for lines to xenopsd, even if the rest of the command line is bad: xenopsd must
/// be told in every case.
pub(crate) fn control_out(words: &[String]) -> Option<i32> {
    words.iter().enumerate().find_map(|(at, word)| {
        let (name, value) = option(word)?;
        let value = value.or_else(|| words.get(at + 1).map(String::as_str));
        (name == "controloutfd").then(|| value?.parse().ok())?
    })
}

/// An option's name, and its value if it is in the same word.
fn option(word: &str) -> Option<(&str, Option<&str>)> {
    let name = word.strip_prefix('-')?;
    let name = name.strip_prefix('-').unwrap_or(name);
    Some(match name.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (name, None),
    })
}

fn read(words: &[String]) -> Result<Given, String> {
    let mut given = Given::default();
    let mut words = words.iter().map(String::as_str).peekable();
    while let Some(word) = words.next() {
        let Some((name, inline)) = option(word) else {
            return Err(format!("{word:?} is not an option"));
        };
        match name {
            "help" | "h" => given.print = Some(HELP.to_owned()),
            "version" => {
                let version = env!("CARGO_PKG_VERSION");
                given.print = Some(format!("xsr-emu-manager {version}"));
            }
            // One published emu-manager takes it as a flag, the other as an option with a value.
            "debug" => {
                let value = inline.or_else(|| {
                    let next = words.peek().copied();
                    next.filter(|next| ["true", "false"].contains(next))
                        .inspect(|_| {
                            words.next();
                        })
                });
                given.debug = flag("-debug", value.or(Some("true")))?;
            }
            _ => {
                let mut unused = None;
                let place = match name {
                    "controloutfd" => &mut given.control_out,
                    "controlinfd" => &mut given.control_in,
                    "fd" => &mut given.stream,
                    "domid" => &mut given.domid,
                    "mode" => &mut given.mode,
                    "live" => &mut given.live,
                    "store_port" => &mut given.store_port,
                    "console_port" => &mut given.console_port,
                    "compress" => &mut given.compress,
                    "mem_pnode" => &mut given.node,
                    "dm" | "supports" | "fork" | "debuglog" | "trace" | "traceparent"
                    | "tracestate" => &mut unused,
                    _ => return Err(format!("unknown option {word:?}")),
                };
                let value = inline.or_else(|| words.next());
                let value = value.ok_or_else(|| format!("-{name} has no value"))?;
                *place = Some(value.to_owned());
                match name {
                    "dm" => given.dm.push(value.to_owned()),
                    "supports" => given.print = Some((value == "migration-v2").to_string()),
                    "debuglog" => given.debug = true,
                    _ => {}
                }
            }
        }
    }
    Ok(given)
}

fn flag(name: &str, value: Option<&str>) -> Result<bool, String> {
    match value {
        None | Some("false") => Ok(false),
        Some("true") => Ok(true),
        Some(other) => Err(format!("{name} is {other:?}, expected true or false")),
    }
}

fn number<N: FromStr>(name: &str, value: &str) -> Result<N, String> {
    let plain = value.bytes().all(|byte| byte.is_ascii_digit());
    let number = value.parse().ok().filter(|_| plain);
    number.ok_or_else(|| format!("{name} is {value:?}, expected a number in range"))
}

fn required<N: FromStr>(name: &str, value: Option<String>) -> Result<N, String> {
    let value = value.ok_or_else(|| format!("{name} is missing"))?;
    number(name, &value)
}

fn optional<N: FromStr>(name: &str, value: Option<String>) -> Result<Option<N>, String> {
    value.map(|value| number(name, &value)).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    fn parsed(line: &str) -> Result<Request, String> {
        parse(&words(line))
    }

    fn save(live: bool) -> Args {
        Args {
            control_out: 7,
            control_in: 8,
            stream: 9,
            domid: DomId(12),
            mode: Mode::Save { live },
            translated: true,
            qemu: false,
            vgpu: false,
            compress: false,
            node: None,
            debug: false,
        }
    }

    const SAVE: &str = "-controloutfd 7 -controlinfd 8 -fd 9 -mode hvm_save -domid 12";

    #[test]
    fn xenopsd_s_command_lines_are_understood() {
        assert_eq!(parsed(SAVE), Ok(Request::Work(save(false))));
        let line = "--domid=12 --mode hvm_save -fd=9 -live true -controlinfd 8 --controloutfd 7";
        assert_eq!(parsed(line), Ok(Request::Work(save(true))));
        let line = format!("{SAVE} -dm qemu -dm vgpu:9 -live false -compress true -mem_pnode 1");
        let expected = Args {
            qemu: true,
            vgpu: true,
            compress: true,
            node: Some("1".to_owned()),
            ..save(false)
        };
        assert_eq!(parsed(&line), Ok(Request::Work(expected)));
        let line = "-controloutfd 7 -controlinfd 8 -fd 9 -mode restore -domid 12 -store_port 3 \
                    -console_port 5 -fork true -traceparent a-b -tracestate a=b -trace true";
        let expected = Args {
            mode: Mode::Restore {
                store_port: 3,
                console_port: 5,
            },
            translated: false,
            ..save(false)
        };
        assert_eq!(parsed(line), Ok(Request::Work(expected)));
    }

    #[test]
    fn debug_has_a_value_or_none() {
        let debug = Args {
            debug: true,
            ..save(false)
        };
        for line in ["-debug true", "-debug", "--debug=true", "-debuglog 3"] {
            let line = format!("{line} {SAVE}");
            assert_eq!(parsed(&line), Ok(Request::Work(debug.clone())), "{line}");
        }
        let line = format!("-debug false {SAVE}");
        assert_eq!(parsed(&line), Ok(Request::Work(save(false))));
    }

    #[test]
    fn a_question_gets_an_answer() {
        for (line, text) in [
            ("-supports migration-v2", "true"),
            ("-supports tea", "false"),
            (
                "--version",
                concat!("xsr-emu-manager ", env!("CARGO_PKG_VERSION")),
            ),
            ("-help", HELP),
        ] {
            assert_eq!(parsed(line), Ok(Request::Print(text.to_owned())), "{line}");
        }
    }

    #[test]
    fn a_bad_command_line_is_refused() {
        for (line, said) in [
            ("", "-mode is missing"),
            ("-no_such true", "unknown option \"-no_such\""),
            ("-fd", "-fd has no value"),
            ("tea", "\"tea\" is not an option"),
            ("-mode tea", "-mode is \"tea\""),
            ("-mode save -domid 7x", "-controloutfd is missing"),
            (
                "-mode save -controloutfd 7 -controlinfd 8 -fd 9 -domid 7x",
                "-domid is \"7x\"",
            ),
            (
                "-mode save -controloutfd 7 -controlinfd 8 -fd 9 -domid 70000",
                "-domid",
            ),
            (
                "-mode save -controloutfd 7 -controlinfd 8 -fd -1 -domid 7",
                "-fd is \"-1\"",
            ),
            ("-mode save -live yes", "-live is \"yes\""),
            ("-mode save -dm tea", "-dm is \"tea\""),
            ("-mode save -dm qemu:4", "-dm is \"qemu:4\""),
            ("-mode save -dm vgpu:x", "-dm vgpu: is \"x\""),
            ("-mode restore -store_port 3", "-console_port is missing"),
        ] {
            let error = parsed(line).unwrap_err();
            assert!(error.contains(said), "{line}: {error}");
        }
    }

    #[test]
    fn xenopsd_is_found_on_a_bad_command_line() {
        for (line, fd) in [
            ("-tea 3 -controloutfd 7", Some(7)),
            ("--controloutfd=7 -domid", Some(7)),
            ("-controloutfd", None),
            ("-controloutfd x", None),
            ("", None),
        ] {
            assert_eq!(control_out(&words(line)), fd, "{line}");
        }
    }
}
