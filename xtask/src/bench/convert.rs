//! Conversion of a legacy image: the command beside Xen's Python script, and beside cp of
//! the same file, in the same run.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use super::measure::measure;
use super::{Row, quoted, shell, table};
use crate::{peer, workspace};

/// The script, in the package of Xen's tools.
const SCRIPT: &str = "usr/lib/xen-4.17/bin/convert-legacy-stream";
const PYTHON: &str = "usr/lib/xen-4.17/lib/python";

/// Measure; the table in Markdown.
///
/// # Errors
///
/// A command fails, or there is no `python3` to make the image with.
pub(super) fn run(xsr: &Path, scratch: &Path, memory: u64, rounds: u32) -> Result<String> {
    let (xsr, dir) = (quoted(xsr)?, quoted(scratch)?);
    let maker = quoted(&workspace::root().join("tools/legacy_image.py"))?;
    shell(&format!(
        "{xsr} mock create guest --host {dir}/host --type hvm --memory {memory}M && \
         {xsr} --quiet save --backend mock:{dir}/host guest {dir}/saved && \
         python3 {maker} --from {dir}/saved -o {dir}/legacy && rm -rf {dir}/saved {dir}/host"
    ))?;
    let remove = format!("rm -f {dir}/copy");
    let legacy = format!("{dir}/legacy");
    let mut rows = vec![
        Row::new("cp", format!("cp {legacy} {dir}/copy"), None),
        Row::new(
            "xsr convert",
            format!("{xsr} --quiet convert {legacy} -o {dir}/copy"),
            Some(0),
        ),
        Row::new(
            "xsr convert, from a pipe",
            format!("cat {legacy} | {xsr} --quiet convert - -o {dir}/copy"),
            Some(0),
        ),
    ];
    match peer::unpacked() {
        Some(tools) => {
            let (script, python) = (quoted(&tools.join(SCRIPT))?, quoted(&tools.join(PYTHON))?);
            rows.push(Row::new(
                "Xen's script",
                format!(
                    "PYTHONDONTWRITEBYTECODE=1 PYTHONPATH={python} python3 {script} --in {legacy} \
                     --out {dir}/copy --width 64 --guest-type hvm --format libxl"
                ),
                Some(0),
            ));
        }
        None => eprintln!("without Xen's script: `cargo xtask peer-tools` fetches it"),
    }
    for round in 0..rounds {
        eprintln!("convert: round {} of {rounds}", round + 1);
        for row in &mut rows {
            row.used.push(measure(&row.command)?);
            shell(&remove)?;
        }
    }
    let image = scratch.join("legacy");
    let bytes = fs::metadata(&image)
        .with_context(|| format!("cannot read {}", image.display()))?
        .len();
    let mut report = String::new();
    table(&mut report, "legacy hvm", bytes, &rows)?;
    Ok(report)
}
