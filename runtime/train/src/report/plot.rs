//! Inline SVG for the report: line charts and heat maps that take the page's own colours.

use plotters::coord::ranged1d::ValueFormatter;
use plotters::prelude::*;

/// Drawn where the page's text colour is to appear; replaced by `currentColor`.
const INK: RGBColor = RGBColor(1, 2, 3);
/// Colours of series, readable on white and on black.
const SERIES: [RGBColor; 8] = [
    RGBColor(59, 130, 246),
    RGBColor(234, 140, 20),
    RGBColor(16, 165, 120),
    RGBColor(226, 70, 80),
    RGBColor(145, 100, 240),
    RGBColor(20, 165, 185),
    RGBColor(215, 80, 165),
    RGBColor(130, 130, 130),
];
/// Points of a line after which neighbours are averaged.
const MAX_POINTS: usize = 500;

/// One line of a chart.
pub(crate) struct Line {
    /// Name in the legend.
    pub(crate) name: String,
    /// Index of its colour.
    pub(crate) colour: usize,
    /// x and y; points that are not finite are left out.
    pub(crate) points: Vec<(f64, f64)>,
}

/// A chart of lines.
pub(crate) struct Chart<'a> {
    /// Label of the horizontal axis.
    pub(crate) x_label: &'a str,
    /// Label of the vertical one.
    pub(crate) y_label: &'a str,
    /// Logarithmic y, where all values are positive.
    pub(crate) log: bool,
    /// Fixed range of y.
    pub(crate) range: Option<(f64, f64)>,
    /// Steps to mark, each with its series' colour (the change of stage).
    pub(crate) marks: &'a [(f64, usize)],
    /// The lines.
    pub(crate) lines: &'a [Line],
}

/// CSS colour of a series.
pub(crate) fn css(colour: usize) -> String {
    let RGBColor(r, g, b) = SERIES[colour % SERIES.len()];
    format!("#{r:02x}{g:02x}{b:02x}")
}

/// At most [`MAX_POINTS`] points: means of equal runs of neighbours.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let finite: Vec<(f64, f64)> =
        points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect();
    let run = finite.len().div_ceil(MAX_POINTS).max(1);
    finite
        .chunks(run)
        .map(|c| {
            let n = c.len() as f64;
            (c.iter().map(|p| p.0).sum::<f64>() / n, c.iter().map(|p| p.1).sum::<f64>() / n)
        })
        .collect()
}

/// Makes plotters' SVG scale with the page and take its text colour.
fn adapt(svg: String, width: u32, height: u32) -> String {
    svg.replacen(&format!("width=\"{width}\" height=\"{height}\" "), "", 1)
        .replace("#010203", "currentColor")
        .replacen("<svg ", "<svg role=\"img\" ", 1)
}

/// A number as an axis shows it.
pub(crate) fn number(x: f64) -> String {
    let a = x.abs();
    if x == 0.0 {
        "0".into()
    } else if a >= 1e6 {
        format!("{}M", trim(x / 1e6, 2))
    } else if a >= 1e4 {
        format!("{}k", trim(x / 1e3, 1))
    } else if a >= 100.0 {
        format!("{x:.0}")
    } else if a >= 0.001 {
        trim(x, 4)
    } else {
        format!("{x:.0e}")
    }
}

fn trim(x: f64, digits: usize) -> String {
    let text = format!("{x:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_string() } else { text }
}

/// Width and height of a chart.
const SIZE: (u32, u32) = (720, 250);

impl Chart<'_> {
    /// The chart as SVG for a page, with its legend; `None` if there is nothing to draw.
    pub(crate) fn svg(&self) -> Option<String> {
        let drawn = self.drawn()?;
        let named: Vec<&Line> = self.lines.iter().filter(|l| !thin(&l.points).is_empty()).collect();
        let mut legend = String::new();
        if named.len() > 1 || !named[0].name.is_empty() {
            for line in named {
                legend += &format!(
                    "<span><i style=\"background:{}\"></i>{}</span>",
                    css(line.colour),
                    super::escape(&line.name)
                );
            }
            legend = format!("<div class=\"legend\">{legend}</div>");
        }
        Some(format!("{legend}{drawn}"))
    }

    /// The chart alone.
    fn drawn(&self) -> Option<String> {
        let lines: Vec<(&Line, Vec<(f64, f64)>)> =
            self.lines.iter().map(|l| (l, thin(&l.points))).filter(|(_, p)| !p.is_empty()).collect();
        let all = || lines.iter().flat_map(|(_, p)| p.iter().copied());
        let bound =
            |f: fn(f64, f64) -> f64, start: f64, part: fn((f64, f64)) -> f64| all().map(part).fold(start, f);
        if lines.is_empty() {
            return None;
        }
        let (x0, x1) = (bound(f64::min, f64::INFINITY, |p| p.0), bound(f64::max, f64::NEG_INFINITY, |p| p.0));
        let (low, high) =
            (bound(f64::min, f64::INFINITY, |p| p.1), bound(f64::max, f64::NEG_INFINITY, |p| p.1));
        let x1 = if x1 > x0 { x1 } else { x0 + 1.0 };
        let log = self.log && low > 0.0;
        let (y0, y1) = self.range.unwrap_or_else(|| {
            if log {
                (low / 1.15, (high * 1.15).max(low * 1.5))
            } else {
                let margin = ((high - low) * 0.06).max(high.abs() * 0.02).max(1e-9);
                (if low >= 0.0 { (low - margin).max(0.0) } else { low - margin }, high + margin)
            }
        });
        let mut svg = String::new();
        {
            let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
            let mut builder = ChartBuilder::on(&root);
            builder.margin(8).margin_right(16).x_label_area_size(36).y_label_area_size(64);
            let drawn = if log {
                draw(builder.build_cartesian_2d(x0..x1, (y0..y1).log_scale()), self, &lines, (y0, y1))
            } else {
                draw(builder.build_cartesian_2d(x0..x1, y0..y1), self, &lines, (y0, y1))
            };
            drawn.and_then(|()| root.present().map_err(|e| e.to_string())).ok()?;
        }
        Some(adapt(svg, SIZE.0, SIZE.1))
    }
}

/// A file of charts, each under its title and above its legend, in ink that shows on white and on black. Charts without
/// anything to draw are left out; `None` if all are.
pub(crate) fn file(charts: &[(String, Chart<'_>)]) -> Option<String> {
    const COLUMNS: usize = 4;
    const ROW: usize = 18;
    let (mut body, mut y) = (String::new(), 0);
    for (title, chart) in charts {
        let Some(drawn) = chart.drawn() else { continue };
        let (width, height) = SIZE;
        let label = |x: usize, y: usize, text: &str, more: &str| {
            format!("<text x=\"{x}\" y=\"{y}\" fill=\"currentColor\"{more}>{}</text>\n", super::escape(text))
        };
        body += &label(8, y + 20, title, " font-weight=\"600\"");
        body += &drawn.replacen(
            "<svg ",
            &format!("<svg y=\"{}\" width=\"{width}\" height=\"{height}\" ", y + 24),
            1,
        );
        y += 24 + height as usize;
        for (i, line) in chart.lines.iter().enumerate() {
            let (x, y) = (64 + i % COLUMNS * 160, y + i / COLUMNS * ROW);
            body += &format!(
                "<rect x=\"{x}\" y=\"{}\" width=\"14\" height=\"4\" fill=\"{}\"/>",
                y + 6,
                css(line.colour)
            );
            body += &label(x + 20, y + 12, &line.name, "");
        }
        y += chart.lines.len().div_ceil(COLUMNS) * ROW + 16;
    }
    (!body.is_empty()).then(|| {
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {y}\" font-family=\"sans-serif\" font-size=\"13\">\n<style>:root{{color:#24292f}}@media(prefers-color-scheme:dark){{:root{{color:#e6edf3}}}}</style>\n{body}</svg>\n",
            SIZE.0
        )
    })
}

type Drawn<'a, Y> = ChartContext<
    'a,
    SVGBackend<'a>,
    plotters::coord::cartesian::Cartesian2d<plotters::coord::types::RangedCoordf64, Y>,
>;

fn draw<'a, Y, E: std::fmt::Display>(
    chart: Result<Drawn<'a, Y>, E>,
    what: &Chart<'_>,
    lines: &[(&Line, Vec<(f64, f64)>)],
    (y0, y1): (f64, f64),
) -> Result<(), String>
where
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let mut chart = chart.map_err(|e| text(&e))?;
    let font = ("sans-serif", 15).into_font().color(&INK);
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(INK.mix(0.15))
        .axis_style(INK.mix(0.5))
        .label_style(font.clone())
        .axis_desc_style(font)
        .x_labels(8)
        .y_labels(6)
        .x_label_formatter(&|x| number(*x))
        .y_label_formatter(&|y| number(*y))
        .x_desc(what.x_label)
        .y_desc(what.y_label)
        .draw()
        .map_err(|e| text(&e))?;
    for (x, colour) in what.marks {
        let style = SERIES[colour % SERIES.len()].mix(0.6).stroke_width(1);
        let mark = DashedLineSeries::new([(*x, y0), (*x, y1)], 4, 4, style);
        chart.draw_series(mark).map_err(|e| text(&e))?;
    }
    for (line, points) in lines {
        let style = SERIES[line.colour % SERIES.len()].stroke_width(2);
        if points.len() < 40 {
            let dots = points.iter().map(|p| Circle::new(*p, 3, style.filled()));
            chart.draw_series(dots).map_err(|e| text(&e))?;
        }
        chart.draw_series(LineSeries::new(points.iter().copied(), style)).map_err(|e| text(&e))?;
    }
    Ok(())
}

/// Dark blue over green to yellow, for 0..=1.
pub(crate) fn ramp(x: f64) -> (u8, u8, u8) {
    const STOPS: [(f64, f64, f64); 5] = [
        (68.0, 20.0, 90.0),
        (58.0, 82.0, 139.0),
        (33.0, 145.0, 140.0),
        (94.0, 201.0, 98.0),
        (250.0, 228.0, 60.0),
    ];
    let at = x.clamp(0.0, 1.0) * (STOPS.len() - 1) as f64;
    let i = (at as usize).min(STOPS.len() - 2);
    let (a, b, f) = (STOPS[i], STOPS[i + 1], at - i as f64);
    let mix = |p: f64, q: f64| (p + (q - p) * f).round() as u8;
    (mix(a.0, b.0), mix(a.1, b.1), mix(a.2, b.2))
}

/// A heat map: `rows[r][c]` in 0..=1, with labels of rows and columns. NaN cells stay empty.
pub(crate) fn heat_map(
    rows: &[Vec<f64>],
    row_labels: &[String],
    column_labels: &[String],
    x_label: &str,
) -> Option<String> {
    let columns = rows.iter().map(Vec::len).max().filter(|n| *n > 0)?;
    let height = (rows.len() as u32 * if rows.len() > 32 { 9 } else { 16 }).max(48) + 52;
    let size = (720, height);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let mut chart = ChartBuilder::on(&root)
            .margin(8)
            .margin_right(16)
            .x_label_area_size(36)
            .y_label_area_size(84)
            .build_cartesian_2d(0f64..columns as f64, rows.len() as f64..0f64)
            .ok()?;
        let font = ("sans-serif", 14).into_font().color(&INK);
        let cells = rows.iter().enumerate().flat_map(|(r, row)| {
            row.iter().enumerate().filter(|(_, v)| v.is_finite()).map(move |(c, v)| {
                let (red, green, blue) = ramp(*v);
                let corners = [(c as f64, r as f64), (c as f64 + 1.0, r as f64 + 1.0)];
                Rectangle::new(corners, RGBColor(red, green, blue).filled())
            })
        });
        chart.draw_series(cells).ok()?;
        // Labels at the middles of cells, thinned to what fits.
        let area = chart.plotting_area();
        let right = plotters::style::text_anchor::Pos::new(
            plotters::style::text_anchor::HPos::Right,
            plotters::style::text_anchor::VPos::Center,
        );
        let top = plotters::style::text_anchor::Pos::new(
            plotters::style::text_anchor::HPos::Center,
            plotters::style::text_anchor::VPos::Top,
        );
        let every_row = rows.len().div_ceil(32);
        for (r, label) in row_labels.iter().enumerate().step_by(every_row) {
            let (x, y) = area.map_coordinate(&(0.0, r as f64 + 0.5));
            root.draw_text(label, &font.clone().pos(right), (x - 6, y)).ok()?;
        }
        let every_column = columns.div_ceil(12);
        for (c, label) in column_labels.iter().enumerate().step_by(every_column) {
            let (x, y) = area.map_coordinate(&(c as f64 + 0.5, rows.len() as f64));
            root.draw_text(label, &font.clone().pos(top), (x, y + 4)).ok()?;
        }
        let (x, y) = area.map_coordinate(&(columns as f64 / 2.0, rows.len() as f64));
        root.draw_text(x_label, &font.pos(top), (x, y + 20)).ok()?;
        root.present().ok()?;
    }
    Some(adapt(svg, size.0, size.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn charts_have_text_lines_and_no_fixed_ink() {
        let points = (0..2000).map(|i| (i as f64, 1.0 / (1.0 + i as f64))).collect();
        let line = Line { name: "a <b>".into(), colour: 1, points };
        let one = [line];
        for log in [false, true] {
            let chart = Chart {
                x_label: "step",
                y_label: "loss",
                log,
                range: None,
                marks: &[(500.0, 0)],
                lines: &one,
            };
            let svg = chart.svg().unwrap();
            assert!(svg.contains("<text") && svg.contains("loss") && svg.contains("step"), "{svg}");
            assert!(svg.contains("<polyline") && svg.contains("currentColor") && svg.contains("a &lt;b&gt;"));
            assert!(!svg.contains("#010203") && !svg.contains("fill=\"#FFFFFF\""));
            assert!(svg.len() < 60_000, "{}", svg.len());
        }
        let chart =
            |lines| Chart { x_label: "mass", y_label: "ms", log: false, range: None, marks: &[], lines };
        let svg = file(&[
            ("one".into(), chart(&one)),
            ("none".into(), chart(&[])),
            ("two & three".into(), chart(&one)),
        ]);
        let svg = svg.unwrap();
        for (wanted, times) in
            [("<svg", 3), ("</svg>", 3), ("a &lt;b&gt;", 2), ("two &amp; three", 1), ("none<", 0)]
        {
            assert_eq!(svg.matches(wanted).count(), times, "{wanted}: {svg}");
        }
        assert!(
            svg.contains("viewBox=\"0 0 720 616\"") && file(&[("none".into(), chart(&[]))]).is_none(),
            "{svg}"
        );
        let empty = Line { name: String::new(), colour: 0, points: vec![(0.0, f64::NAN)] };
        let nothing = Chart { x_label: "", y_label: "", log: true, range: None, marks: &[], lines: &[empty] };
        assert!(nothing.svg().is_none());
        let single = Line { name: String::new(), colour: 0, points: vec![(3.0, 0.0)] };
        let chart = Chart { x_label: "", y_label: "", log: true, range: None, marks: &[], lines: &[single] };
        assert!(chart.svg().unwrap().contains("<circle"));
    }

    #[test]
    fn heat_maps_have_a_cell_for_each_value() {
        let rows = vec![vec![0.0, 0.5, 1.0], vec![f64::NAN, 0.25, 0.75]];
        let labels = |n: usize| (0..n).map(|i| format!("r{i}")).collect::<Vec<_>>();
        let svg = heat_map(&rows, &labels(2), &labels(3), "step").unwrap();
        assert_eq!(svg.matches("<rect").count(), 5);
        assert!(svg.contains("#FAE43C") && svg.contains("#44145A"), "{svg}");
        assert!(heat_map(&[], &[], &[], "").is_none());
    }

    #[test]
    fn numbers_are_short() {
        let shown: Vec<String> =
            [0.0, 0.25, 12.5, 250.0, 12_000.0, 3.2e6, 1e-5].iter().map(|x| number(*x)).collect();
        assert_eq!(shown, ["0", "0.25", "12.5", "250", "12k", "3.2M", "1e-5"]);
    }
}
