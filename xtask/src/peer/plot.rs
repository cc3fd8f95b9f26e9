//! What both engines and `cat` take, as an SVG: a group of bars for each task, a line in each
//! bar from the least to the most. Written by hand, as the other plot is.

use std::fmt::Write as _;

use crate::spread::Spread;

const LEFT: f64 = 190.0;
const WIDTH: f64 = 860.0;
const BAR: f64 = 9.0;
const GAP: f64 = 12.0;
const TOP: f64 = 44.0;
const COLOURS: [&str; 4] = ["#c8553d", "#7fb2d6", "#1b6ca8", "#aaaaaa"];

/// One task: its name, and what it took each contender, in the order of the colours.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) name: String,
    pub(super) bars: Vec<(&'static str, Spread)>,
}

/// The plot.
pub(super) fn bars(title: &str, unit: &str, groups: &[Group]) -> String {
    let mut svg = String::new();
    draw(&mut svg, title, unit, groups).expect("a string takes everything");
    svg
}

fn draw(svg: &mut String, title: &str, unit: &str, groups: &[Group]) -> std::fmt::Result {
    let bars: f64 = groups.iter().map(|group| count(group.bars.len())).sum();
    let height = TOP + bars * BAR + count(groups.len()) * GAP + 40.0;
    let figures = groups.iter().flat_map(|group| &group.bars);
    let most = figures.fold(1.0, |most: f64, (_, figure)| most.max(figure.most));
    let most = most.ceil();
    let scale = (WIDTH - LEFT - 20.0) / most;
    writeln!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0}" font-family="sans-serif" font-size="11">
<title>{title}</title>
<rect width="{WIDTH}" height="{height:.0}" fill="#ffffff"/>"##
    )?;
    let bottom = height - 34.0;
    let step = (most / 8.0).ceil();
    let mut mark = 0.0;
    while mark <= most {
        let x = LEFT + mark * scale;
        writeln!(
            svg,
            r##"<line x1="{x:.1}" y1="{TOP}" x2="{x:.1}" y2="{bottom:.1}" stroke="#dddddd"/><text x="{x:.1}" y="{:.1}" text-anchor="middle">{mark}</text>"##,
            bottom + 14.0
        )?;
        mark += step;
    }
    writeln!(
        svg,
        r#"<text x="{:.1}" y="{:.1}" text-anchor="middle">{unit}</text>"#,
        f64::midpoint(LEFT, WIDTH),
        bottom + 29.0
    )?;
    let mut y = TOP + GAP / 2.0;
    for (index, Group { name, bars }) in groups.iter().enumerate() {
        let middle = y + count(bars.len()) * BAR / 2.0 + 4.0;
        let x = LEFT - 8.0;
        writeln!(
            svg,
            r#"<text x="{x}" y="{middle:.1}" text-anchor="end">{name}</text>"#
        )?;
        for ((contender, spread), colour) in bars.iter().zip(COLOURS) {
            let Spread {
                least,
                median,
                most,
            } = spread;
            let length = median * scale;
            writeln!(
                svg,
                r##"<rect x="{LEFT}" y="{y:.1}" width="{length:.1}" height="{:.1}" fill="{colour}"/><line x1="{:.1}" y1="{:.1}" x2="{:.1}" y2="{:.1}" stroke="#000000" stroke-opacity="0.6"/>"##,
                BAR - 1.0,
                LEFT + least * scale,
                y + BAR / 2.0,
                LEFT + most * scale,
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
