//! Line plots as inline SVG that take their ink from the page, so that light and dark both read.

use crate::error::TuneError;
use plotters::prelude::*;

/// One line of a plot.
pub(crate) struct Series {
    pub(crate) name: String,
    /// (x, y), ascending in x.
    pub(crate) points: Vec<(f64, f64)>,
    /// Marks alone: a peer, or a single measurement.
    pub(crate) marks_only: bool,
}

/// A plot. Axes that count in powers are given as logarithms; `x_text` and `y_text` print what an axis value means.
pub(crate) struct Plot<'a> {
    pub(crate) title: String,
    pub(crate) x: &'a str,
    pub(crate) y: &'a str,
    pub(crate) x_text: fn(f64) -> String,
    pub(crate) y_text: fn(f64) -> String,
    pub(crate) x_labels: usize,
    pub(crate) y_from_zero: bool,
    pub(crate) series: Vec<Series>,
}

/// Colours that keep their contrast on white and on near-black.
const COLOURS: [RGBColor; 8] = [
    RGBColor(59, 130, 196),
    RGBColor(217, 130, 43),
    RGBColor(63, 156, 90),
    RGBColor(196, 74, 120),
    RGBColor(138, 111, 209),
    RGBColor(194, 160, 32),
    RGBColor(42, 165, 160),
    RGBColor(140, 140, 150),
];
/// Written by the plotter, replaced by the page's own ink.
const INK: RGBColor = RGBColor(1, 2, 3);

fn css(colour: RGBColor) -> String {
    format!("#{:02x}{:02x}{:02x}", colour.0, colour.1, colour.2)
}

fn range(values: impl Iterator<Item = f64> + Clone, from_zero: bool) -> (f64, f64) {
    let low = values.clone().fold(f64::INFINITY, f64::min);
    let high = values.fold(f64::NEG_INFINITY, f64::max);
    let low = if from_zero { low.min(0.0) } else { low };
    let margin = ((high - low) * 0.06).max(1e-6 + high.abs() * 0.01);
    (if from_zero && low == 0.0 { 0.0 } else { low - margin }, high + margin)
}

/// The plot and its legend as HTML; nothing where there is no point.
pub(crate) fn html(plot: &Plot<'_>) -> Result<String, TuneError> {
    let points = || plot.series.iter().flat_map(|s| s.points.iter());
    if points().next().is_none() {
        return Ok(String::new());
    }
    let (x0, x1) = range(points().map(|p| p.0), false);
    let (y0, y1) = range(points().map(|p| p.1), plot.y_from_zero);
    let mut svg = String::new();
    draw(plot, &mut svg, (x0, x1), (y0, y1))
        .map_err(|why| TuneError::Plot { title: plot.title.clone(), why })?;
    let svg = svg.replace(&css(INK), "currentColor").replace("#010203", "currentColor");
    let mut legend = String::new();
    for (i, series) in plot.series.iter().enumerate().filter(|(_, s)| !s.points.is_empty()) {
        let mark = if series.marks_only { "\u{25cf}" } else { "\u{2501}" };
        legend += &format!(
            "<li><span style=\"color:{}\">{mark}</span> {}</li>",
            css(COLOURS[i % COLOURS.len()]),
            crate::report::escape(&series.name)
        );
    }
    Ok(format!(
        "<figure><figcaption>{}</figcaption>{svg}<ul class=\"legend\">{legend}</ul></figure>\n",
        crate::report::escape(&plot.title)
    ))
}

fn draw(plot: &Plot<'_>, svg: &mut String, x: (f64, f64), y: (f64, f64)) -> Result<(), String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let root = SVGBackend::with_string(svg, (560, 360)).into_drawing_area();
    let mut chart = ChartBuilder::on(&root)
        .margin(8)
        .x_label_area_size(46)
        .y_label_area_size(64)
        .build_cartesian_2d(x.0..x.1, y.0..y.1)
        .map_err(|e| text(&e))?;
    let label = ("sans-serif", 15).into_font().color(&INK);
    chart
        .configure_mesh()
        .x_desc(plot.x)
        .y_desc(plot.y)
        .x_labels(plot.x_labels)
        .y_labels(8)
        .x_label_formatter(&|v| (plot.x_text)(*v))
        .y_label_formatter(&|v| (plot.y_text)(*v))
        .label_style(label.clone())
        .axis_desc_style(label)
        .axis_style(INK.mix(0.6))
        .bold_line_style(INK.mix(0.14))
        .light_line_style(TRANSPARENT)
        .draw()
        .map_err(|e| text(&e))?;
    for (i, series) in plot.series.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        if !series.marks_only {
            chart
                .draw_series(LineSeries::new(series.points.iter().copied(), colour.stroke_width(2)))
                .map_err(|e| text(&e))?;
        }
        chart
            .draw_series(series.points.iter().map(|p| Circle::new(*p, 3, colour.filled())))
            .map_err(|e| text(&e))?;
    }
    root.present().map_err(|e| text(&e))
}
