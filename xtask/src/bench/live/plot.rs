//! Downtime against dirty rate, as an SVG: two logarithmic axes, a line for each guest
//! and policy, a bar from the least to the most. Written by hand, since one plot is not
//! worth a library of them.

use std::fmt::Write as _;

use crate::spread::Spread;

/// A line of the plot.
#[derive(Debug)]
pub(super) struct Series {
    pub(super) name: String,
    pub(super) points: Vec<Point>,
}

/// A point of it.
#[derive(Debug)]
pub(super) struct Point {
    /// Pages written per second.
    pub(super) rate: f64,
    /// Milliseconds.
    pub(super) downtime: Spread,
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 440.0;
/// Left, right, top, bottom.
const MARGINS: [f64; 4] = [70.0, 20.0, 20.0, 50.0];
const COLOURS: [&str; 6] = [
    "#1b6ca8", "#c8553d", "#588b3c", "#8a4fa3", "#b58900", "#555555",
];

/// A logarithmic axis over whole decades.
struct Axis {
    low: i32,
    high: i32,
    from: f64,
    to: f64,
}

impl Axis {
    fn over(figures: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let (mut low, mut high) = (i32::MAX, i32::MIN);
        for figure in figures.filter(|figure| figure.is_finite() && *figure > 0.0) {
            // Decades from a millionth to a billion, which holds any figure here.
            let decade = (-6..=9).rev().find(|n| 10_f64.powi(*n) <= figure);
            let decade = decade.unwrap_or(-6);
            low = low.min(decade);
            high = high.max(decade + 1);
        }
        match low < high {
            true => Self {
                low,
                high,
                from,
                to,
            },
            false => Self {
                low: 0,
                high: 1,
                from,
                to,
            },
        }
    }

    fn at(&self, figure: f64) -> f64 {
        let least = 10_f64.powi(self.low);
        let (low, high) = (f64::from(self.low), f64::from(self.high));
        let place = (figure.max(least).log10() - low) / (high - low);
        self.from + place * (self.to - self.from)
    }

    fn decades(&self) -> impl Iterator<Item = f64> + use<> {
        (self.low..=self.high).map(|n| 10_f64.powi(n))
    }
}

/// The plot; `target_ms` becomes a dashed line.
pub(super) fn downtime(series: &[Series], target_ms: u64) -> String {
    let [left, right, top, bottom] = MARGINS;
    let all = || series.iter().flat_map(|series| &series.points);
    let target = f64::from(u32::try_from(target_ms).unwrap_or(u32::MAX));
    let x = Axis::over(all().map(|point| point.rate), left, WIDTH - right);
    let figures = all().flat_map(|point| [point.downtime.least, point.downtime.most]);
    let y = Axis::over(figures.chain([target]), HEIGHT - bottom, top);
    let mut svg = String::new();
    draw(&mut svg, series, target, &x, &y).expect("a string takes everything");
    svg
}

fn draw(svg: &mut String, series: &[Series], target: f64, x: &Axis, y: &Axis) -> std::fmt::Result {
    writeln!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">
<title>Downtime of live migrations against the rate at which the guest writes</title>
<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>"##
    )?;
    for rate in x.decades() {
        let at = x.at(rate);
        writeln!(
            svg,
            r##"<line x1="{at:.1}" y1="{:.1}" x2="{at:.1}" y2="{:.1}" stroke="#dddddd"/><text x="{at:.1}" y="{:.1}" text-anchor="middle">{rate}</text>"##,
            y.from,
            y.to,
            y.from + 18.0
        )?;
    }
    for downtime in y.decades() {
        let at = y.at(downtime);
        writeln!(
            svg,
            r##"<line x1="{:.1}" y1="{at:.1}" x2="{:.1}" y2="{at:.1}" stroke="#dddddd"/><text x="{:.1}" y="{:.1}" text-anchor="end">{downtime}</text>"##,
            x.from,
            x.to,
            x.from - 8.0,
            at + 4.0
        )?;
    }
    let at = y.at(target);
    writeln!(
        svg,
        r##"<line x1="{:.1}" y1="{at:.1}" x2="{:.1}" y2="{at:.1}" stroke="#000000" stroke-dasharray="5 4"/><text x="{:.1}" y="{:.1}" text-anchor="end">target {target} ms</text>
<text x="{:.1}" y="{:.1}" text-anchor="middle">pages written per second</text>
<text transform="translate(16 {:.1}) rotate(-90)" text-anchor="middle">downtime, ms</text>"##,
        x.from,
        x.to,
        x.to,
        at - 5.0,
        f64::midpoint(x.from, x.to),
        HEIGHT - 12.0,
        f64::midpoint(y.from, y.to),
    )?;
    for (index, (series, colour)) in series.iter().zip(COLOURS.iter().cycle()).enumerate() {
        let mut line = String::new();
        for point in &series.points {
            let (across, up) = (x.at(point.rate), y.at(point.downtime.median));
            write!(line, "{across:.1},{up:.1} ")?;
            writeln!(
                svg,
                r##"<line x1="{across:.1}" y1="{:.1}" x2="{across:.1}" y2="{:.1}" stroke="{colour}" stroke-opacity="0.4"/><circle cx="{across:.1}" cy="{up:.1}" r="3" fill="{colour}"/>"##,
                y.at(point.downtime.least),
                y.at(point.downtime.most),
            )?;
        }
        let row = u32::try_from(index).unwrap_or(0);
        let legend = MARGINS[2] + 14.0 + 16.0 * f64::from(row);
        writeln!(
            svg,
            r##"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="1.5"/>
<rect x="{:.1}" y="{:.1}" width="12" height="3" fill="{colour}"/><text x="{:.1}" y="{legend:.1}">{}</text>"##,
            line.trim_end(),
            x.from + 12.0,
            legend - 5.0,
            x.from + 30.0,
            series.name,
        )?;
    }
    writeln!(svg, "</svg>")
}
