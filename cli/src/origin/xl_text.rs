//! xl's configuration as text, as in images of Xen 4.1 to 4.4: one setting per line, with strings,
//! numbers and lists.
//!
//! Manual: xl.cfg(5). C implementation: `libxlu_cfg_l.l`, `libxlu_cfg_y.y` and `parse_config_data`
//! in `xl_cmdimpl.c` as of Xen 4.4. If a name is set twice, the last setting counts.

use std::collections::BTreeMap;

use xsr_xen_backend::GuestKind;

use super::{Found, settings, shortened};

/// Lists of devices.
const DEVICES: [&str; 7] = ["disk", "vif", "pci", "vfb", "vtpm", "usbdev", "channel"];
/// Settings that are read in this file.
const READ: [&str; 11] = [
    "name", "uuid", "type", "builder", "pvh", "memory", "maxmem", "vcpus", "maxvcpus", "root",
    "extra",
];

/// The value of a setting.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Text(String),
    List(Vec<String>),
}

/// A token of the text.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(String),
    Text(String),
    Sign(char),
    Line,
}

/// Split a text into tokens.
fn tokens(text: &str) -> Result<Vec<(usize, Token)>, String> {
    let mut out = Vec::new();
    let mut line = 1;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let token = match c {
            ' ' | '\t' | '\r' | '\0' => continue,
            '\n' => Token::Line,
            '#' => {
                while chars.next_if(|c| *c != '\n').is_some() {}
                continue;
            }
            ',' | '[' | ']' | '=' | ';' => Token::Sign(c),
            '\'' | '"' => {
                let mut value = String::new();
                loop {
                    match chars.next() {
                        Some(end) if end == c => break,
                        Some('\\') => value.push(escaped(&mut chars)),
                        Some('\n') | None => {
                            return Err(format!("line {line}: a string has no end"));
                        }
                        Some(other) => value.push(other),
                    }
                }
                Token::Text(value)
            }
            c if c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.') => {
                let mut word = String::from(c);
                let goes_on = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.');
                while let Some(c) = chars.next_if(goes_on) {
                    word.push(c);
                }
                Token::Word(word)
            }
            // Newer versions append to lists.
            '+' if chars.peek() == Some(&'=') => continue,
            c => return Err(format!("line {line}: {c:?} is not expected")),
        };
        let is_line = token == Token::Line;
        out.push((line, token));
        line += usize::from(is_line);
    }
    Ok(out)
}

/// The character that an escape stands for.
fn escaped(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) -> char {
    match chars.next() {
        Some('a') => '\u{7}',
        Some('b') => '\u{8}',
        Some('f') => '\u{c}',
        Some('n') => '\n',
        Some('r') => '\r',
        Some('t') => '\t',
        Some('v') => '\u{b}',
        Some('x') => {
            let mut number = 0;
            for _ in 0..2 {
                let digit = chars.next_if(char::is_ascii_hexdigit);
                number = digit
                    .and_then(|c| c.to_digit(16))
                    .map_or(number, |digit| number * 16 + digit);
            }
            char::from_u32(number).unwrap_or('\u{fffd}')
        }
        Some(c) => c,
        None => '\\',
    }
}

/// All settings of a text.
fn all_of(text: &str) -> Result<BTreeMap<String, Value>, String> {
    let tokens = tokens(text)?;
    let mut tokens = tokens.into_iter().peekable();
    let mut out = BTreeMap::new();
    while let Some((line, token)) = tokens.next() {
        let wrong = |what: &str| Err(format!("line {line}: expected {what}"));
        let name = match token {
            Token::Line | Token::Sign(';') => continue,
            Token::Word(name) => name,
            _ => return wrong("the name of a setting"),
        };
        if tokens.next().map(|(_, token)| token) != Some(Token::Sign('=')) {
            return wrong(&format!("'=' after {:?}", shortened(&name)));
        }
        let value = match tokens.next().map(|(_, token)| token) {
            Some(Token::Text(text) | Token::Word(text)) => Value::Text(text),
            Some(Token::Sign('[')) => {
                let mut list = Vec::new();
                // Newer versions have nested lists, whose contents are not needed.
                let mut depth = 1;
                while depth > 0 {
                    match tokens.next().map(|(_, token)| token) {
                        Some(Token::Text(text) | Token::Word(text)) => list.push(text),
                        Some(Token::Sign('[')) => depth += 1,
                        Some(Token::Sign(']')) => depth -= 1,
                        Some(Token::Line | Token::Sign(',')) => {}
                        _ => return wrong("a list that ends with ']'"),
                    }
                }
                Value::List(list)
            }
            _ => return wrong("a string, a number or a list"),
        };
        match tokens.next().map(|(_, token)| token) {
            None | Some(Token::Line | Token::Sign(';')) => {}
            Some(_) => return wrong("the end of the line after a value"),
        }
        out.insert(name, value);
    }
    Ok(out)
}

/// The configuration of a domain.
pub(super) fn read(text: &str) -> Result<Found, String> {
    let all = all_of(text)?;
    let get = |name: &str| match all.get(name) {
        Some(Value::Text(text)) => Some(text.as_str()),
        _ => None,
    };
    let number = |name: &str| {
        let text = get(name)?;
        match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => text.parse::<u64>().ok(),
        }
    };
    // "type" came with Xen 4.10; before that there were "builder" and, in 4.4, "pvh".
    let kind = match (get("type"), get("builder"), get("pvh")) {
        (Some("hvm"), ..) | (None, Some("hvm"), _) => GuestKind::Hvm,
        (Some("pvh"), ..) => GuestKind::Pvh,
        _ => GuestKind::Pv,
    };
    let max = number("maxmem").or_else(|| number("memory"));
    let vcpus = number("maxvcpus").or_else(|| number("vcpus")).unwrap_or(1);
    let mut found = Found {
        name: get("name").map(str::to_owned),
        uuid: get("uuid").map(str::to_owned),
        kind: Some(kind),
        vcpus: u32::try_from(vcpus).ok(),
        max_memory_kib: max.and_then(|mib| mib.checked_mul(1024)),
        devices: Vec::new(),
        ..Found::default()
    };
    for (name, value) in &all {
        match value {
            Value::List(list) if DEVICES.contains(&name.as_str()) => {
                for device in list {
                    found.device(&[name, device]);
                }
            }
            Value::List(list) => found.setting(&[name, &list.join(" ")]),
            Value::Text(_) if READ.contains(&name.as_str()) => {}
            Value::Text(text) => settings::take(&mut found, Some(kind), name, text),
        }
    }
    // Both belong to the kernel's command line.
    let command_line = [
        get("root").map(|root| format!("root={root}")),
        get("extra").map(str::to_owned),
    ];
    let command_line: Vec<String> = command_line.into_iter().flatten().collect();
    if !command_line.is_empty() && kind != GuestKind::Hvm {
        settings::take(&mut found, Some(kind), "cmdline", &command_line.join(" "));
    }
    Ok(found)
}

/// The text with another value for a setting, appended as a line, because the last one counts.
pub(crate) fn with_setting(text: &str, name: &str, value: &str) -> String {
    let mut quoted = String::new();
    for c in value.chars() {
        if matches!(c, '"' | '\\') {
            quoted.push('\\');
        }
        quoted.push(c);
    }
    let text = text.trim_end_matches(['\n', '\0']);
    format!("{text}\n{name} = \"{quoted}\"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# made by hand\nname = \"old\"; builder='hvm'\n\
        memory = 512\nmaxmem=0x300 # hexadecimal\nvcpus = 2\nmaxvcpus = 4\n\
        uuid = '6f18a89f-849d-4334-8633-5976cbcde14c'\n\
        disk = [ 'phy:/dev/vg/a,xvda,w',\n  \"file:/b \\\"c\\\".iso,hdc:cdrom,r\", ]\n\
        vif = ['mac=00:16:3e:00:00:01, bridge=xenbr0']\nname = 'new'\n";

    #[test]
    fn xls_text_says_what_the_domain_is() {
        let found = read(TEXT).expect("it is well-formed");
        assert_eq!(found.name.as_deref(), Some("new"), "the later one counts");
        assert_eq!(found.kind, Some(GuestKind::Hvm));
        assert_eq!(
            (found.vcpus, found.max_memory_kib),
            (Some(4), Some(768 << 10))
        );
        assert_eq!(found.devices.len(), 3);
        assert_eq!(found.devices[1], "disk file:/b \"c\".iso,hdc:cdrom,r");
        assert!(found.settings.is_empty() && found.carried.is_empty());
    }

    #[test]
    fn other_settings_are_carried_or_named() {
        let text = "name='x'\nmemory=64\nkernel='/boot/k'\nroot='/dev/xvda1 ro'\n\
            extra='quiet'\non_crash='preserve'\non_reboot=\"destroy\"\ncpus=['0', '2']\n\
            vncpasswd='secret'\ncpuid='host,tm=0'\n";
        let found = read(text).expect("it is well-formed");
        let mut carried = found.carried;
        carried.sort_by_key(|(at, _)| *at);
        let expected: [(&str, serde_json::Value); 4] = [
            ("/b_info/cmdline", "root=/dev/xvda1 ro quiet".into()),
            ("/b_info/kernel", "/boot/k".into()),
            ("/on_crash", "preserve".into()),
            ("/on_reboot", "destroy".into()),
        ];
        assert_eq!(carried, expected);
        assert_eq!(
            found.settings,
            ["cpuid host,tm=0", "cpus 0 2", "vncpasswd secret"]
        );
    }

    #[test]
    fn a_guest_without_a_builder_is_pv_and_has_one_vcpu() {
        let found = read("name='x'\nbuilder = \"generic\"\nmemory=4").expect("good");
        assert_eq!((found.kind, found.vcpus), (Some(GuestKind::Pv), Some(1)));
    }

    #[test]
    fn a_setting_can_be_added_whatever_is_in_it() {
        let name = "a \"b\" \\ c";
        let text = with_setting(TEXT, "name", name);
        assert_eq!(read(&text).expect("good").name.as_deref(), Some(name));
    }

    #[test]
    fn what_xl_would_not_read_is_refused_with_its_line() {
        for (text, line) in [
            ("name = 'x", "line 1"),
            ("\n\nname", "line 3"),
            ("a = [ 'x'\n", "line 1"),
            ("a = 1 2", "line 1"),
            ("\n{\"c_info\": 1}", "line 2"),
            ("= 3", "line 1"),
        ] {
            let error = read(text).expect_err(text);
            assert!(error.contains(line), "{text:?}: {error}");
        }
    }
}
