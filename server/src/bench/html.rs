//! A report as one page that needs nothing besides itself: tables, and plots in SVG.
//!
//! # Place
//! a pure function of a report
//! # Invariants
//! 1. The page loads nothing: no script, no font, no image, no address.
//! 2. Text that came from elsewhere is escaped wherever it stands.

use std::fmt::Write as _;

use super::report::{Report, Row, Verified};

/// Size of a plot, and the room that its axes take of it.
const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 16.0;
const BOTTOM: f64 = 40.0;

/// Told apart also by who does not see all colors.
const COLORS: [&str; 8] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#8c6d00"];

const STYLE: &str = "body{font:15px/1.5 sans-serif;max-width:900px;margin:2em auto;padding:0 1em;color:#222;background:#fff}\
h1{font-size:1.4em}h2{font-size:1.1em;margin-top:2em}table{border-collapse:collapse;font-variant-numeric:tabular-nums}\
td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}td.name,th.name{text-align:left}\
svg{width:100%;height:auto}svg text{font:12px sans-serif;fill:#444}.bad{color:#b00020;font-weight:bold}";

/// The page.
pub(super) fn page(report: &Report) -> String {
    let title = format!("mainstay bench: {}", report.workload);
    let mut body = String::new();
    let _ = write!(body, "<h1>{}</h1>\n{}", escape(&title), summary(report));
    body += &table(report);
    body += "<h2>Latency by percentile</h2>\n";
    body += &latency_plot(&report.operations);
    body += "<h2>Throughput over time</h2>\n";
    let throughput = report.intervals.iter().map(|interval| (interval.at_seconds, interval.ops_per_second)).collect();
    body += &time_plot("operations/s", &[("operations/s", throughput)], false);
    body += "<h2>Latency over time</h2>\n";
    // Where nothing was answered there is no latency.
    let answered = || report.intervals.iter().filter(|interval| interval.ops_per_second > 0.0);
    let mean = answered().map(|interval| (interval.at_seconds, interval.mean_ms)).collect();
    let max = answered().map(|interval| (interval.at_seconds, interval.max_ms)).collect();
    body += &time_plot("ms", &[("mean", mean), ("maximum", max)], true);
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<title>{}</title>\n<style>{STYLE}</style>\n</head>\n\
         <body>\n{body}</body>\n</html>\n",
        escape(&title)
    )
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            c => out.push(c),
        }
    }
    out
}

fn summary(report: &Report) -> String {
    let mut lines = vec![
        format!(
            "{}, {} clients, {} records ({}), values of {} bytes, seed {}",
            report.through, report.clients, report.records, report.distribution, report.value_bytes, report.seed
        ),
        match report.rate {
            Some(rate) => format!("at {rate} operations a second; latencies count from when an operation was due"),
            None => "at full speed; latencies count from when an operation was sent".to_owned(),
        },
        format!("{} operations in {:.1} s, {:.0}/s", report.ops, report.seconds, report.ops_per_second),
    ];
    if let Some(load) = report.load {
        lines.push(format!("loaded {} records in {:.1} s, {:.0}/s", load.records, load.seconds, load.ops_per_second));
    }
    let mut bad = Vec::new();
    if report.errors > 0 {
        bad.push(format!("{} errors, the first: {}", report.errors, report.first_error.as_deref().unwrap_or_default()));
    }
    if report.not_begun > 0 {
        bad.push(format!("{} operations were due and not begun by the end", report.not_begun));
    }
    if let Some(verified) = &report.verified {
        let Verified { during, after, missing, wrong, unread, examples } = verified;
        let line = format!(
            "verified {during} values during the run and {after} records after it: {missing} missing, {wrong} wrong, {unread} unread"
        );
        if verified.is_sound() {
            lines.push(line)
        } else {
            bad.push(line)
        }
        bad.extend(examples.iter().cloned());
    }
    let good = lines.iter().map(|line| format!("{}<br>\n", escape(line))).collect::<String>();
    let bad = bad.iter().map(|line| format!("<span class=\"bad\">{}</span><br>\n", escape(line))).collect::<String>();
    format!("<p>\n{good}{bad}</p>\n")
}

fn table(report: &Report) -> String {
    let mut out = "<table>\n<tr><th class=\"name\">operation</th><th class=\"name\">durability</th><th>ops</th><th>ops/s</th><th>mean \
                   ms</th><th>p50</th><th>p90</th><th>p99</th><th>p99.9</th><th>p99.99</th><th>max</th></tr>\n"
        .to_owned();
    for row in &report.operations {
        let _ = write!(
            out,
            "<tr><td class=\"name\">{}</td><td class=\"name\">{}</td><td>{}</td><td>{:.0}</td>",
            escape(&row.operation),
            escape(row.durability.as_deref().unwrap_or("")),
            row.ops,
            row.ops_per_second
        );
        for latency in [row.mean_ms, row.p50_ms, row.p90_ms, row.p99_ms, row.p999_ms, row.p9999_ms, row.max_ms] {
            let _ = write!(out, "<td>{latency:.3}</td>");
        }
        out += "</tr>\n";
    }
    out + "</table>\n"
}

fn name_of(row: &Row) -> String {
    match &row.durability {
        Some(durability) => format!("{}, {durability}", row.operation),
        None => row.operation.clone(),
    }
}

/// From a value to its place on an axis.
struct Axis {
    from: f64,
    to: f64,
    logarithmic: bool,
    /// Where the axis begins and ends on the page.
    begin: f64,
    end: f64,
}

impl Axis {
    fn place(&self, value: f64) -> f64 {
        let on = |value: f64| if self.logarithmic { value.max(f64::MIN_POSITIVE).log10() } else { value };
        let part = (on(value) - on(self.from)) / (on(self.to) - on(self.from)).max(1e-12);
        self.begin + (self.end - self.begin) * part.clamp(0.0, 1.0)
    }

    /// A vertical axis that holds all `values`.
    fn vertical(values: impl Iterator<Item = f64>, logarithmic: bool) -> Self {
        let (mut low, mut high) = (f64::INFINITY, 0.0f64);
        for value in values.filter(|value| value.is_finite() && *value > 0.0) {
            (low, high) = (low.min(value), high.max(value));
        }
        let (from, to) = match (logarithmic, low.is_finite()) {
            (_, false) => (if logarithmic { 0.1 } else { 0.0 }, 1.0),
            (true, true) => {
                let from = 10f64.powf(low.log10().floor());
                (from, 10f64.powf(high.log10().ceil()).max(from * 10.0))
            }
            (false, true) => (0.0, high * 1.05),
        };
        Self { from, to, logarithmic, begin: HEIGHT - BOTTOM, end: TOP }
    }

    fn ticks(&self) -> Vec<f64> {
        if self.logarithmic {
            let (from, to) = (self.from.log10().round() as i32, self.to.log10().round() as i32);
            return (from..=to).map(|power| 10f64.powi(power)).collect();
        }
        let step = step(self.to - self.from);
        let count = ((self.to - self.from) / step).floor() as u32;
        (0..=count).map(|n| self.from + step * f64::from(n)).collect()
    }
}

/// 1, 2 or 5 times a power of ten that divides `span` into about five.
fn step(span: f64) -> f64 {
    let rough = (span / 5.0).max(1e-9);
    let power = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|factor| factor * power).find(|step| *step >= rough).unwrap_or(10.0 * power)
}

fn number(value: f64) -> String {
    if value == 0.0 || value >= 10.0 {
        format!("{value:.0}")
    } else {
        let text = format!("{value:.4}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    }
}

fn begin(label: &str) -> String {
    format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">\n", escape(label))
}

fn vertical(axis: &Axis, label: &str) -> String {
    let mut out = String::new();
    for tick in axis.ticks() {
        let y = axis.place(tick);
        let _ = writeln!(
            out,
            "<line x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{:.1}\" y2=\"{y:.1}\" stroke=\"#e4e4e4\"/><text x=\"{:.1}\" y=\"{:.1}\" \
             text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            y + 4.0,
            number(tick)
        );
    }
    let _ = writeln!(out, "<text x=\"4\" y=\"{:.1}\">{}</text>", TOP - 4.0, escape(label));
    out
}

fn horizontal(axis: &Axis, ticks: &[(f64, String)], label: &str) -> String {
    let (bottom, mut out) = (HEIGHT - BOTTOM, String::new());
    for (tick, text) in ticks {
        let x = axis.place(*tick);
        let _ = writeln!(
            out,
            "<line x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{bottom:.1}\" stroke=\"#e4e4e4\"/><text x=\"{x:.1}\" y=\"{:.1}\" \
             text-anchor=\"middle\">{}</text>",
            bottom + 16.0,
            escape(text)
        );
    }
    let right = WIDTH - RIGHT;
    let _ =
        writeln!(out, "<text x=\"{right:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>", bottom + 32.0, escape(label));
    out
}

fn line(n: usize, name: &str, points: impl Iterator<Item = (f64, f64)>) -> String {
    let color = COLORS[n % COLORS.len()];
    let points = points.map(|(x, y)| format!("{x:.1},{y:.1}")).collect::<Vec<_>>().join(" ");
    let (x, y) = (LEFT + 12.0, TOP + 16.0 + 16.0 * n as f64);
    format!(
        "<polyline fill=\"none\" stroke=\"{color}\" stroke-width=\"1.8\" points=\"{points}\"/>\n<rect x=\"{x:.1}\" y=\"{:.1}\" \
         width=\"12\" height=\"3\" fill=\"{color}\"/><text x=\"{:.1}\" y=\"{y:.1}\">{}</text>\n",
        y - 5.0,
        x + 18.0,
        escape(name)
    )
}

/// Each percentile as far to the right as it has nines: 90, 99, 99.9 at equal distances.
fn latency_plot(rows: &[Row]) -> String {
    let above = |percentile: f64| 100.0 / (100.0 - percentile).max(1e-12);
    let points = |row: &Row| -> Vec<(f64, f64)> {
        // 100 itself is nowhere: the maximum stands where one operation lies above.
        let end = (row.ops.max(2)) as f64;
        row.curve.iter().map(|(percentile, ms)| (above(*percentile).min(end), *ms)).collect()
    };
    let most = rows.iter().map(|row| row.ops as f64).fold(10.0, f64::max);
    let to = 10f64.powf(most.log10().ceil());
    let x = Axis { from: 1.0, to, logarithmic: true, begin: LEFT, end: WIDTH - RIGHT };
    let y = Axis::vertical(rows.iter().flat_map(|row| row.curve.iter().map(|(_, ms)| *ms)), true);
    let ticks: Vec<(f64, String)> = x
        .ticks()
        .into_iter()
        .enumerate()
        .map(|(nines, place)| {
            let text = match nines {
                0 => "0".to_owned(),
                1 => "90".to_owned(),
                2 => "99".to_owned(),
                nines => format!("99.{}", "9".repeat(nines - 2)),
            };
            (place, text)
        })
        .collect();
    let mut out = begin("latency in ms by percentile") + &vertical(&y, "ms") + &horizontal(&x, &ticks, "percentile");
    for (n, row) in rows.iter().enumerate() {
        out += &line(n, &name_of(row), points(row).into_iter().map(|(at, ms)| (x.place(at), y.place(ms))));
    }
    out + "</svg>\n"
}

fn time_plot(label: &str, series: &[(&str, Vec<(f64, f64)>)], logarithmic: bool) -> String {
    let last = series.iter().flat_map(|(_, points)| points.iter().map(|(at, _)| *at)).fold(0.0, f64::max);
    let x = Axis { from: 0.0, to: last.max(1e-3), logarithmic: false, begin: LEFT, end: WIDTH - RIGHT };
    let y = Axis::vertical(series.iter().flat_map(|(_, points)| points.iter().map(|(_, value)| *value)), logarithmic);
    let ticks: Vec<(f64, String)> = x.ticks().into_iter().map(|at| (at, number(at))).collect();
    let mut out = begin(&format!("{label} over time")) + &vertical(&y, label) + &horizontal(&x, &ticks, "seconds");
    for (n, (name, points)) in series.iter().enumerate() {
        out += &line(n, name, points.iter().map(|(at, value)| (x.place(*at), y.place(*value))));
    }
    out + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::super::report::Interval;
    use super::*;

    fn report() -> Report {
        let row = |operation: &str, durability: Option<&str>| Row {
            operation: operation.into(),
            durability: durability.map(str::to_owned),
            ops: 1_000,
            curve: vec![(0.0, 0.2), (50.0, 0.5), (99.0, 3.0), (99.9, 40.0), (100.0, 41.0)],
            ..Row::default()
        };
        let interval = |n: u32| Interval {
            at_seconds: f64::from(n) / 10.0,
            ops_per_second: 900.0 + f64::from(n),
            mean_ms: 0.6,
            max_ms: 41.0,
        };
        Report {
            workload: "a".into(),
            operations: vec![row("read", None), row("update", Some("site:<north> & \"south\""))],
            intervals: (0..50).map(interval).collect(),
            first_error: Some("<script>alert('x')</script>".into()),
            errors: 1,
            ..Report::default()
        }
    }

    #[test]
    fn the_page_shows_every_operation_and_loads_nothing() {
        let page = page(&report());
        assert_eq!(page.matches("<svg ").count(), 3);
        assert_eq!(
            page.matches("<polyline ").count(),
            2 + 1 + 2,
            "a curve an operation, one of throughput, two of latency"
        );
        for needed in ["read", "update, site:&lt;north&gt; &amp; &quot;south&quot;", "99.9", "operations/s", "maximum"]
        {
            assert!(page.contains(needed), "{needed} is missing");
        }
        for refused in ["<script", "src=", "href", "url(", "@import", "http:", "https:", "<link", "<img", "<north>"] {
            assert!(!page.contains(refused), "{refused} is in the page");
        }
        let open = page.matches('<').count();
        assert_eq!(open, page.matches('>').count(), "nothing is left open");
    }

    #[test]
    fn a_page_of_nothing_has_no_places_off_the_page() {
        let mut odd = report();
        odd.operations[0].curve.clear();
        odd.intervals.truncate(1);
        odd.intervals[0].ops_per_second = 0.0;
        for report in [Report::default(), odd] {
            let page = page(&report);
            assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
        }
    }

    #[test]
    fn values_lie_on_their_axis() {
        let axis = Axis::vertical([0.3, 45.0].into_iter(), true);
        assert_eq!((axis.from, axis.to), (0.1, 100.0));
        assert_eq!((axis.place(0.1), axis.place(100.0)), (HEIGHT - BOTTOM, TOP));
        let between = (axis.place(1.0) - (HEIGHT - BOTTOM)) / (TOP - (HEIGHT - BOTTOM));
        assert!((between - 1.0 / 3.0).abs() < 1e-9, "{between}");
        assert_eq!(axis.ticks().len(), 4);
        let axis = Axis::vertical([0.0, 940.0].into_iter(), false);
        assert_eq!(axis.ticks(), [0.0, 200.0, 400.0, 600.0, 800.0]);
        for (span, expect) in [(5.0, 1.0), (9.0, 2.0), (12.0, 5.0), (30.0, 10.0), (0.07, 0.02)] {
            assert!((step(span) - expect).abs() < 1e-12, "{span}: {}", step(span));
        }
        assert_eq!([0.0, 0.25, 2.0, 200.0].map(number), ["0", "0.25", "2", "200"]);
    }
}
