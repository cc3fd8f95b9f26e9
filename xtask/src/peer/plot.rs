//! Throughput of both engines and of `cat`, as an SVG: a group of bars for each task, a line
//! in each bar from the least to the most. Written by hand, as the other plot is.

use std::fmt::Write as _;

use super::bench::Report;

const LEFT: f64 = 190.0;
const WIDTH: f64 = 860.0;
const BAR: f64 = 9.0;
const GAP: f64 = 12.0;
const TOP: f64 = 44.0;
const COLOURS: [&str; 4] = ["#c8553d", "#7fb2d6", "#1b6ca8", "#aaaaaa"];

/// The plot.
pub(super) fn throughput(reports: &[Report]) -> String {
    let mut svg = String::new();
    draw(&mut svg, reports).expect("a string takes everything");
    svg
}

fn draw(svg: &mut String, reports: &[Report]) -> std::fmt::Result {
    let groups: Vec<_> = reports
        .iter()
        .flat_map(|report| {
            let named = |row: &super::bench::Row| {
                (
                    format!("{}: {}", report.kind, row.what),
                    row.rates(report.gib),
                )
            };
            report.rows.iter().map(named).collect::<Vec<_>>()
        })
        .collect();
    let bars: f64 = groups.iter().map(|(_, rates)| count(rates.len())).sum();
    let height = TOP + bars * BAR + count(groups.len()) * GAP + 40.0;
    let rates = groups.iter().flat_map(|(_, rates)| rates);
    let most = rates.fold(1.0, |most: f64, (_, [fastest, ..])| most.max(*fastest));
    let most = most.ceil();
    let scale = (WIDTH - LEFT - 20.0) / most;
    writeln!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0}" font-family="sans-serif" font-size="11">
<title>Throughput of saves and restores: Xen's helper, ours, and cat</title>
<rect width="{WIDTH}" height="{height:.0}" fill="#ffffff"/>"##
    )?;
    let bottom = height - 34.0;
    let step = (most / 8.0).ceil();
    let mut rate = 0.0;
    while rate <= most {
        let x = LEFT + rate * scale;
        writeln!(
            svg,
            r##"<line x1="{x:.1}" y1="{TOP}" x2="{x:.1}" y2="{bottom:.1}" stroke="#dddddd"/><text x="{x:.1}" y="{:.1}" text-anchor="middle">{rate}</text>"##,
            bottom + 14.0
        )?;
        rate += step;
    }
    writeln!(
        svg,
        r#"<text x="{:.1}" y="{:.1}" text-anchor="middle">GiB/s</text>"#,
        f64::midpoint(LEFT, WIDTH),
        bottom + 29.0
    )?;
    let mut y = TOP + GAP / 2.0;
    for (index, (name, rates)) in groups.iter().enumerate() {
        let middle = y + count(rates.len()) * BAR / 2.0 + 4.0;
        let x = LEFT - 8.0;
        writeln!(
            svg,
            r#"<text x="{x}" y="{middle:.1}" text-anchor="end">{name}</text>"#
        )?;
        for ((contender, [fastest, median, slowest]), colour) in rates.iter().zip(COLOURS) {
            let length = median * scale;
            writeln!(
                svg,
                r##"<rect x="{LEFT}" y="{y:.1}" width="{length:.1}" height="{:.1}" fill="{colour}"/><line x1="{:.1}" y1="{:.1}" x2="{:.1}" y2="{:.1}" stroke="#000000" stroke-opacity="0.6"/>"##,
                BAR - 1.0,
                LEFT + slowest * scale,
                y + BAR / 2.0,
                LEFT + fastest * scale,
                y + BAR / 2.0,
            )?;
            if index == 0 {
                let place = COLOURS.iter().position(|c| *c == colour).unwrap_or(0);
                let x = LEFT + 150.0 * count(place);
                writeln!(
                    svg,
                    r#"<rect x="{x:.1}" y="14" width="12" height="9" fill="{colour}"/><text x="{:.1}" y="22">{contender}</text>"#,
                    x + 18.0
                )?;
            }
            y += BAR;
        }
        y += GAP;
    }
    writeln!(svg, "</svg>")
}

fn count(n: usize) -> f64 {
    u32::try_from(n).map_or(0.0, f64::from)
}
