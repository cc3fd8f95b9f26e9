//! Error messages about files that are not saved domains.

use std::io::Read;

use anyhow::Error;
use xsr_format::detect::foreign::{self, Foreign, SEARCHED};
use xsr_format::detect::{Detected, detect, find};
use xsr_format::error::{Place, Position, ReadError, ReadErrorCause};

use super::{Source, bad, unwrapped};
use crate::exit::described;

/// The error for data that do not begin like an image: what they are instead, and whether an image
/// begins further in. `inside` is the layer around them, and their offset in its contents.
pub(crate) fn unreadable(source: &mut Source, inside: Option<(&str, u64)>) -> Error {
    let mut start = Vec::new();
    let read = source
        .by_ref()
        .take(SEARCHED as u64)
        .read_to_end(&mut start);
    if let Err(error) = read {
        return unwrapped(error);
    }
    let detected = detect(&start);
    if start.is_empty() || (inside.is_none() && is_cut_magic(detected)) {
        let position = Position {
            place: Place::Start,
            offset: 0,
        };
        let cause = ReadErrorCause::Unreadable(detected);
        return Error::new(ReadError { position, cause });
    }
    let zeros = start.iter().take_while(|byte| **byte == 0).count();
    let ones = start.iter().take_while(|byte| **byte == 0xff).count();
    let what = match detected {
        Detected::Foreign(foreign) => format!("it is {}", described(foreign)),
        _ if zeros == start.len() && zeros < SEARCHED => format!(
            "it holds only zeros, {zeros} of them: its contents were lost (a power failure does \
             that), or never written"
        ),
        _ if zeros == start.len() => format!(
            "it begins with {zeros} zeros or more: its contents were lost (a power failure does \
             that), or never written"
        ),
        _ if ones == start.len() => format!(
            "it begins with {ones} bytes of 0xff{}, as erased flash memory does: its contents were \
             lost, or never written",
            if ones < SEARCHED {
                " and has no other"
            } else {
                ""
            }
        ),
        _ => {
            let begins = start.get(..8).unwrap_or(&start).escape_ascii();
            format!(
                "it begins with \"{begins}\", as nothing does that is known here; it is damaged \
                 in its first bytes, encrypted, or something else"
            )
        }
    };
    let place = match inside {
        Some((layer, 0)) => format!("inside its {layer} data: "),
        Some((layer, before)) => format!("after the {layer} header, at byte {before}: "),
        None => String::new(),
    };
    // The contents of an archive must be extracted, not cut out.
    let is_archive = matches!(detected, Detected::Foreign(foreign) if foreign.is_archive());
    let found = find(&start).filter(|_| !is_archive);
    let further_in = match (found, inside) {
        (Some((at, image)), None) => format!(
            "; {} begins at byte {at}: if the bytes before it do not belong to it, cut them \
             off (tail -c +{} FILE)",
            image_name(image),
            at + 1
        ),
        (Some((at, image)), Some((_, 0))) => {
            let name = image_name(image);
            format!("; {name} begins at byte {at} of what is inside")
        }
        (Some((at, image)), Some((layer, before))) => {
            let at = before.saturating_add(at as u64);
            let name = image_name(image);
            format!("; {name} begins at byte {at}: what {layer} has before it is damaged")
        }
        (None, _) => String::new(),
    };
    bad(format!("{place}not a saved Xen domain: {what}{further_in}"))
}

/// Whether it would be readable if it were not truncated.
fn is_cut_magic(detected: Detected) -> bool {
    !matches!(detected, Detected::Foreign(_) | Detected::Unknown)
}

fn image_name(image: Detected) -> &'static str {
    match image {
        Detected::Xl => "an image of xl",
        Detected::Libvirt => "an image of libvirt",
        Detected::Xapi | Detected::XapiLegacy => "a suspend image of xapi",
        Detected::Xend => "an image of xend",
        Detected::Libxl => "a libxl stream",
        _ => "a libxc stream",
    }
}

/// What the end of a file reveals, if its start does not.
pub(crate) fn by_its_end(last: &[u8]) -> Option<Foreign> {
    foreign::by_its_end(last)
}
