use super::channel::Channel;
use super::*;
use crate::fit::SideData;
use crate::testing::noise;

fn data(side: Side, head_dim: usize) -> SideData {
    let (kv_heads, ctx, windows) = (2, 200, 2);
    let n = windows * ctx * kv_heads * head_dim;
    // Channels of very different size, the second of each pair an echo of the first.
    let mut values = noise(n, 5);
    for token in values.chunks_exact_mut(kv_heads * head_dim) {
        for c in (0..token.len()).step_by(2) {
            let size = 4.0 / (1.0 + c as f32);
            token[c] *= size;
            token[c + 1] = 0.9 * token[c] + 0.1 * size * token[c + 1];
        }
    }
    SideData { side, values, gradients: noise(n, 6), ctx, kv_heads, head_dim }
}

#[test]
fn wider_codes_cost_less_and_the_budget_is_kept() {
    let books = || (Books::new(data(Side::Key, 8), 1), Books::new(data(Side::Value, 8), 1));
    let layers = [books(), books()];
    for (k, v) in &layers {
        for c in k.channels.iter().chain(&v.channels) {
            assert!(c.cost[..6].is_sorted_by(|a, b| a >= b), "{:?}", c.cost);
            assert!(c.cost[7] <= c.cost[6], "{:?}", c.cost);
        }
    }
    let error = |fits: &[LayerFit]| -> f64 {
        let mut total = 0.0;
        for (fit, (k, v)) in fits.iter().zip(&layers) {
            for (fit, books) in [(&fit.keys, k), (&fit.values, v)] {
                let mixed = fit.mixed.as_ref().unwrap();
                for place in 0..mixed.order.len() {
                    // Axes of values have changed their order: bounds tell them apart.
                    let c = place / 8 * 8 + mixed.order[place] as usize;
                    let channel = books.channels.iter().find(|b| (b.lower, b.upper) == (fit.lower[c], fit.upper[c]));
                    let channel = channel.expect("bounds are the books'");
                    total += channel.cost[mixed.widths[place / 4] as usize];
                }
            }
        }
        total
    };
    let bits = |fits: &[LayerFit]| -> f64 {
        let sides = fits.iter().flat_map(|f| [&f.keys, &f.values]);
        let widths: Vec<u8> = sides.flat_map(|s| s.mixed.as_ref().unwrap().widths.clone()).collect();
        widths.iter().map(|b| f64::from(*b)).sum::<f64>() / widths.len() as f64 + OUTLIER_BITS * OUTLIERS
    };
    let mut before = f64::INFINITY;
    for hundredths in [50, 100, 200, 225, 300, 400] {
        let fits = fits(&layers, hundredths);
        assert!((bits(&fits) - f64::from(hundredths) / 100.0).abs() <= 1.0 / 16.0, "{} {hundredths}", bits(&fits));
        let now = error(&fits);
        assert!(now < before, "{hundredths}: {now} {before}");
        before = now;
    }
    // Better than the same width for all.
    let same: f64 = layers.iter().flat_map(|(k, v)| k.channels.iter().chain(&v.channels)).map(|c| c.cost[2]).sum();
    assert!(error(&fits(&layers, 200)) < 0.8 * same);
}

#[test]
fn values_lie_in_order_and_equal_pairs_of_keys_together() {
    let books = [Books::new(data(Side::Key, 8), 1), Books::new(data(Side::Value, 8), 1)];
    let widths = [4, 3, 3, 4, 2, 2, 2, 2, 0, 1, 1, 1, 1, 0, 0, 0];
    assert_eq!(order(&books[0], &widths), [0, 3, 1, 2, 4, 5, 6, 7, 10, 11, 9, 12, 14, 15, 8, 13]);
    let layers = [(Books::new(data(Side::Key, 8), 1), Books::new(data(Side::Value, 8), 1))];
    let fits = fits(&layers, 250);
    let (books, fit) = (&layers[0].1, &fits[0].values);
    let mixed = fit.mixed.as_ref().unwrap();
    assert!(mixed.widths.chunks(2).all(|head| head.is_sorted_by(|a, b| a >= b)));
    for (place, &c) in mixed.order.iter().enumerate() {
        assert_eq!(c as usize, place % 8);
        let axis = &mixed.transform[place * 8..][..8];
        let channel = books.transform.chunks_exact(8).position(|a| a == axis).expect("the same axes");
        assert_eq!((channel / 8, fit.lower[place]), (place / 8, books.channels[channel].lower));
    }
}

#[test]
fn bounds_leave_the_tails_and_signposts_ignore_them() {
    let mut x = noise(10_000, 3);
    let weights = vec![1.0; x.len()];
    let plain = Channel::new(&x, &weights);
    // As many wild values as may be outliers on a side.
    let wild = (OUTLIERS / 2.0 * x.len() as f64) as usize;
    x[..wild].fill(1e4);
    let channel = Channel::new(&x, &weights);
    let beyond = |v: &&f32| **v < channel.lower || **v > channel.upper;
    assert_eq!(x.iter().filter(beyond).count(), 2 * wild);
    assert!(channel.upper < 10.0, "{}", channel.upper);
    for bits in 0..=7u8 {
        // Within rounding.
        assert!(channel.top(bits) <= 1.0001 * channel.upper.max(-channel.lower), "{bits}");
        let (with, without) = (channel.cost[bits as usize], plain.cost[bits as usize]);
        assert!((with / without - 1.0).abs() < 0.1, "{bits}: {with} {without}");
    }
    // Nothing is beyond where all are equal.
    let same = Channel::new(&[0.25; 1000], &[1.0; 1000]);
    assert_eq!((same.lower, same.upper), (0.25, 0.25));
}

#[test]
fn transforms_decorrelate() {
    for side in [Side::Key, Side::Value] {
        let mut d = data(side, 8);
        let books = Books::new(data(side, 8), 0);
        match side {
            Side::Key => transform::turn(&mut d.values, &books.transform),
            Side::Value => transform::project(&mut d.values, &books.transform, 8),
        }
        let tokens: Vec<&[f32]> = d.values.chunks_exact(16).collect();
        let mean = |c: usize| tokens.iter().map(|t| f64::from(t[c])).sum::<f64>() / tokens.len() as f64;
        for (a, b) in (0..8).map(|pair| (2 * pair, 2 * pair + 1)) {
            let (ma, mb) = (mean(a), mean(b));
            let sum = |i: usize, mi: f64, j: usize, mj: f64| -> f64 {
                tokens.iter().map(|t| (f64::from(t[i]) - mi) * (f64::from(t[j]) - mj)).sum()
            };
            let (xx, yy, xy) = (sum(a, ma, a, ma), sum(b, mb, b, mb), sum(a, ma, b, mb));
            assert!(xy.abs() < 1e-3 * (xx * yy).sqrt().max(1e-9), "{side:?} channel {a}: {xx} {yy} {xy}");
            assert!(xx >= yy, "the main axis comes first");
        }
    }
}

#[test]
fn tables_hold_what_the_books_say() {
    let books = Books::new(data(Side::Value, 8), 0);
    for channel in &books.channels {
        for bits in 0..=7u8 {
            let top = channel.top(bits);
            let step = top / f32::from(TOP);
            let entries = channel.entries(bits, step);
            assert_eq!(entries.len(), Table::entries(bits.into()));
            let table = Table::from_entries(&entries);
            let values: Vec<i16> = (0..1u32 << bits).map(|c| table.value(bits.into(), c as u8)).collect();
            assert!(values.is_sorted() && values.iter().all(|v| v.abs() <= TOP), "{bits}: {values:?}");
        }
    }
}
