//! Quality against bits, as an SVG.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::evaluate::EvalError;
use crate::report::Report;

impl Report {
    /// KL divergence (logarithmic) against bits per element; the fp16 reference, whose divergence is 0, is left out.
    ///
    /// # Errors
    /// There is nothing to draw.
    pub fn plot_svg(&self) -> Result<String, EvalError> {
        let points: Vec<_> = self.results.iter().filter(|r| r.kld_mean > 0.0).collect();
        if points.is_empty() {
            return Err(EvalError::Plot("no quantized cache was evaluated".into()));
        }
        let of = |f: fn(f64, f64) -> f64, start: f64, x: &dyn Fn(usize) -> f64| (0..points.len()).map(x).fold(start, f);
        let bits = |i: usize| points[i].bits_per_element;
        let kld = |i: usize| points[i].kld_mean;
        let (left, right) = (of(f64::min, 8.0, &bits).floor() - 0.5, of(f64::max, 0.0, &bits).ceil() + 1.0);
        let (low, high) = (of(f64::min, 1.0, &kld) / 1.6, of(f64::max, 0.0, &kld) * 1.6);
        let mut svg = String::new();
        draw(self, &points, left..right, low..high, &mut svg).map_err(|e| EvalError::Plot(e.to_string()))?;
        Ok(svg)
    }
}

fn draw(
    report: &Report,
    points: &[&crate::EvalResult],
    x: std::ops::Range<f64>,
    y: std::ops::Range<f64>,
    svg: &mut String,
) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(svg, (760, 460)).into_drawing_area();
    root.fill(&WHITE)?;
    let title = format!(
        "{}, {}: {} windows of {}, {} prefill",
        report.model, report.text, report.windows, report.ctx, report.prefill
    );
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 16))
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(70)
        .build_cartesian_2d(x, y.log_scale())?;
    chart
        .configure_mesh()
        .x_desc("bits per element, everything counted")
        .y_desc("mean KL divergence from fp16, nats")
        .y_label_formatter(&|v| format!("{v:.3}"))
        .light_line_style(WHITE.mix(0.0))
        .draw()?;
    let blue = RGBColor(0x1f, 0x5f, 0xa8);
    let style = ("sans-serif", 13).into_font().color(&BLACK).pos(Pos::new(HPos::Left, VPos::Center));
    chart.draw_series(points.iter().map(|r| {
        EmptyElement::at((r.bits_per_element, r.kld_mean))
            + Circle::new((0, 0), 5, blue.filled())
            + Text::new(r.kv.clone(), (9, 0), style.clone())
    }))?;
    root.present()?;
    drop(chart);
    Ok(())
}
