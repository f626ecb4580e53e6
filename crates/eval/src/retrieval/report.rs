//! What was found, as a table, JSON or heat maps.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use serde::{Deserialize, Serialize};

use super::{RetrievalError, Task};
use crate::report::table;

/// One length and depth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Tokens of the prompt that were asked for.
    pub length: usize,
    /// Place of the fact, in percent of the text.
    pub depth: usize,
    /// Tokens of the prompt, averaged over trials.
    pub prompt_tokens: usize,
    /// Share of greedy answers with the number.
    pub found: f64,
    /// Mean negative log-likelihood of the number's tokens, in nats.
    pub nll: f64,
}

/// What one cache did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RetrievalResult {
    /// The spec as given.
    pub kv: String,
    /// Share of greedy answers with the number, over all cells.
    pub found: f64,
    /// Mean negative log-likelihood of the number's tokens, over all cells, in nats.
    pub nll: f64,
    /// All stored bits per key or value element, after the last question.
    pub bits_per_element: f64,
    /// One entry for each length and depth.
    pub cells: Vec<Cell>,
}

/// All caches; the JSON is a public contract.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RetrievalReport {
    /// The model.
    pub model: String,
    /// What was hidden.
    pub task: Task,
    /// Questions a cell.
    pub trials: usize,
    /// What the questions follow from.
    pub seed: u64,
    /// `quantized` or `exact`.
    pub prefill: String,
    /// One entry a cache.
    pub results: Vec<RetrievalResult>,
}

impl RetrievalReport {
    fn lengths(&self) -> Vec<usize> {
        let mut all: Vec<usize> = self.results.iter().flat_map(|r| &r.cells).map(|c| c.length).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Shares found and losses by length, over all depths: a Markdown table that also reads well in a terminal.
    pub fn table(&self) -> String {
        let lengths = self.lengths();
        let mut head = vec!["cache".to_string(), "bits".to_string()];
        head.extend(lengths.iter().map(|l| format!("found at {l}")));
        head.push("found".into());
        head.extend(lengths.iter().map(|l| format!("loss at {l}")));
        head.push("loss".into());
        let mut rows = vec![head];
        for r in &self.results {
            let of = |length: usize, score: fn(&Cell) -> f64| {
                let cells = || r.cells.iter().filter(move |c| c.length == length);
                cells().map(score).sum::<f64>() / cells().count().max(1) as f64
            };
            let mut row = vec![r.kv.clone(), format!("{:.2}", r.bits_per_element)];
            row.extend(lengths.iter().map(|&l| format!("{:.0} %", 100.0 * of(l, |c| c.found))));
            row.push(format!("{:.1} %", 100.0 * r.found));
            row.extend(lengths.iter().map(|&l| format!("{:.3}", of(l, |c| c.nll))));
            row.push(format!("{:.3}", r.nll));
            rows.push(row);
        }
        table(&rows)
    }

    /// A heat map of length and depth for every cache: green where all was found, red where nothing was; the number is the
    /// loss.
    ///
    /// # Errors
    /// The drawing library refuses.
    pub fn plot_svg(&self) -> Result<String, RetrievalError> {
        let mut svg = String::new();
        self.draw(&mut svg).map_err(|e| RetrievalError::Plot(e.to_string()))?;
        Ok(svg)
    }

    fn draw(&self, svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
        const CELL: (i32, i32) = (68, 28);
        const MARGIN: (i32, i32) = (70, 46);
        let lengths = self.lengths();
        let mut depths: Vec<usize> = self.results.iter().flat_map(|r| &r.cells).map(|c| c.depth).collect();
        depths.sort_unstable();
        depths.dedup();
        let place = |all: &[usize], x: usize| all.iter().position(|a| *a == x).unwrap_or(0) as i32;
        let map = (MARGIN.0 + CELL.0 * lengths.len() as i32 + 20, MARGIN.1 + CELL.1 * depths.len() as i32 + 40);
        let columns = (self.results.len() as i32).clamp(1, 3);
        let rows = (self.results.len() as i32 + columns - 1) / columns;
        let size = ((map.0 * columns).max(640), map.1 * rows + 36);
        let root = SVGBackend::with_string(svg, (size.0 as u32, size.1 as u32)).into_drawing_area();
        root.fill(&WHITE)?;
        let font = |size: i32| ("sans-serif", size).into_font().color(&BLACK);
        let left = |size| font(size).pos(Pos::new(HPos::Left, VPos::Center));
        let middle = |size| font(size).pos(Pos::new(HPos::Center, VPos::Center));
        let right = |size| font(size).pos(Pos::new(HPos::Right, VPos::Center));
        for (i, r) in self.results.iter().enumerate() {
            let (x, y) = (i as i32 % columns * map.0, i as i32 / columns * map.1);
            let title = format!("{}: {:.0} % found, loss {:.3}", r.kv, 100.0 * r.found, r.nll);
            root.draw(&Text::new(title, (x + 12, y + 20), left(14)))?;
            for (row, depth) in depths.iter().enumerate() {
                let at = (x + MARGIN.0 - 6, y + MARGIN.1 + row as i32 * CELL.1 + CELL.1 / 2);
                root.draw(&Text::new(format!("{depth} %"), at, right(12)))?;
            }
            for (column, length) in lengths.iter().enumerate() {
                let at = (x + MARGIN.0 + column as i32 * CELL.0 + CELL.0 / 2, y + map.1 - 28);
                root.draw(&Text::new(length.to_string(), at, middle(12)))?;
            }
            for c in &r.cells {
                let at = (
                    x + MARGIN.0 + place(&lengths, c.length) * CELL.0,
                    y + MARGIN.1 + place(&depths, c.depth) * CELL.1,
                );
                let mix = |from: u8, to: u8| (f64::from(from) + (f64::from(to) - f64::from(from)) * c.found) as u8;
                let color = RGBColor(mix(0xd9, 0x6c), mix(0x6b, 0xb8), mix(0x5f, 0x7a));
                root.draw(&Rectangle::new([at, (at.0 + CELL.0 - 2, at.1 + CELL.1 - 2)], color.filled()))?;
                let centre = (at.0 + CELL.0 / 2, at.1 + CELL.1 / 2);
                root.draw(&Text::new(format!("{:.2}", c.nll), centre, middle(12)))?;
            }
        }
        let task = if self.task == Task::Passkey { "passkey" } else { "multikey" };
        let (model, trials, prefill) = (&self.model, self.trials, &self.prefill);
        let notes = [
            format!("{model}, {task}, {trials} trials a cell, {prefill} prefill"),
            "Columns: tokens of the prompt; rows: depth of the fact. Green: all found, red: none. Numbers: loss in nats."
                .into(),
        ];
        for (i, note) in notes.into_iter().enumerate() {
            root.draw(&Text::new(note, (12, size.1 - 28 + 16 * i as i32), left(11)))?;
        }
        root.present()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> RetrievalReport {
        let result = |kv: &str, worse: f64| {
            let cells = [(512, 0), (512, 50), (1024, 0), (1024, 50)].map(|(length, depth)| Cell {
                length,
                depth,
                prompt_tokens: length - 9,
                found: if depth == 0 { 1.0 } else { 1.0 - worse },
                nll: 0.5 + worse,
            });
            let kv = kv.to_string();
            RetrievalResult {
                kv,
                found: 1.0 - worse / 2.0,
                nll: 0.5 + worse,
                bits_per_element: 3.0,
                cells: cells.into(),
            }
        };
        RetrievalReport {
            model: "m".into(),
            task: Task::Passkey,
            trials: 2,
            seed: 0,
            prefill: "quantized".into(),
            results: vec![result("fp16", 0.0), result("mix2", 0.5)],
        }
    }

    #[test]
    fn the_table_averages_depths() {
        let t = report().table();
        assert!(t.contains("found at 512 | found at 1024 |   found |"), "{t}");
        assert!(t.contains("75 %") && t.contains("1.000"), "{t}");
    }

    #[test]
    fn the_json_has_the_documented_fields() {
        let json = serde_json::to_value(report()).unwrap();
        let keys = |v: &serde_json::Value| {
            let mut keys: Vec<String> = v.as_object().unwrap().keys().cloned().collect();
            keys.sort();
            keys.join(" ")
        };
        assert_eq!(keys(&json), "model prefill results seed task trials");
        assert_eq!(keys(&json["results"][0]), "bits_per_element cells found kv nll");
        assert_eq!(keys(&json["results"][0]["cells"][0]), "depth found length nll prompt_tokens");
        assert_eq!(json["task"], "passkey");
    }

    #[test]
    fn the_heat_map_has_a_tile_for_every_cell() {
        let svg = report().plot_svg().unwrap();
        let tiles = svg.matches("fill=\"#6CB87A\"").count() + svg.matches("fill=\"#A2916C\"").count();
        assert!(svg.starts_with("<svg") && tiles == 8, "{tiles}: {svg}");
    }
}
