//! Quality against bits, as an SVG.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::evaluate::EvalError;
use crate::report::{EvalResult, Report};

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
    points: &[&EvalResult],
    x: std::ops::Range<f64>,
    y: std::ops::Range<f64>,
    svg: &mut String,
) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(svg, (900, 600)).into_drawing_area();
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
    let (ours, simulated) = (RGBColor(0x1f, 0x5f, 0xa8), RGBColor(0xc4, 0x62, 0x1a));
    let style = ("sans-serif", 12).into_font().color(&BLACK).pos(Pos::new(HPos::Left, VPos::Center));
    let at = |r: &EvalResult| chart.backend_coord(&(r.bits_per_element, r.kld_mean));
    let dots: Vec<(i32, i32)> = points.iter().map(|r| at(r)).collect();
    let labels = place(&dots, points.iter().map(|r| 7 * r.kv.len() as i32));
    for ((r, dot), label) in points.iter().zip(&dots).zip(&labels) {
        let color = if r.simulated { simulated } else { ours };
        root.draw(&Circle::new(*dot, 4, color.filled()))?;
        root.draw(&Text::new(r.kv.clone(), *label, style.clone()))?;
    }
    if points.iter().any(|r| r.simulated) {
        let note = "orange: other programs' formats, simulated; bits by formula";
        root.draw(&Text::new(note, (100, 50), style.clone()))?;
    }
    root.present()?;
    Ok(())
}

/// Where labels of some widths begin, each beside its dot: the first place that is free of dots and of labels before.
fn place(dots: &[(i32, i32)], widths: impl Iterator<Item = i32>) -> Vec<(i32, i32)> {
    const HEIGHT: i32 = 13;
    let mut taken: Vec<(i32, i32, i32)> = Vec::new();
    for (&(x, y), width) in dots.iter().zip(widths) {
        let beside = [(x + 9, 0), (x + 9, -1), (x + 9, 1), (x - 9 - width, 0), (x - 9 - width, -1), (x - 9 - width, 1)];
        let further = [(x + 9, -2), (x + 9, 2)];
        let is_free = |&(at, line): &(i32, i32)| {
            let apart = |&(a, b, w): &(i32, i32, i32)| at + width <= a || a + w <= at || (line - b).abs() >= HEIGHT;
            let clear = |&(a, b): &(i32, i32)| a + 5 <= at || a - 5 >= at + width || (line - b).abs() >= HEIGHT / 2 + 3;
            taken.iter().all(apart) && dots.iter().all(clear)
        };
        let mut places = beside.into_iter().chain(further).map(|(at, line)| (at, y + line * HEIGHT));
        let (at, line) = places.find(is_free).unwrap_or((x + 9, y));
        taken.push((at, line, width));
    }
    taken.into_iter().map(|(x, y, _)| (x, y)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_make_room_for_each_other() {
        let labels = place(&[(100, 50), (104, 52), (400, 50)], [60, 60, 60].into_iter());
        assert!(
            (labels[0].1 - labels[1].1).abs() >= 13
                || labels[0].0 + 60 <= labels[1].0
                || labels[1].0 + 60 <= labels[0].0
        );
        assert_eq!(labels[2], (409, 50), "far away, a label stays beside its dot");
    }
}
