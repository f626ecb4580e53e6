//! Mixed widths: decorrelated channels, a codebook for every channel and width, and the choice of widths.
//!
//! The expected loss of an error e in a channel is about E[g^2] e^2 / 2 (paper, section 3.3), so weighted squared
//! errors of all channels of all layers, keys and values alike, add up to one number. The widths minimise it under a
//! mean number of bits, those of outliers counted: with a price on a bit, every unit of 4 channels chooses for itself, and the
//! price is searched until the mean fits (Lagrange).

mod books;
mod channel;
pub(crate) mod transform;

use kvquant_quant::pack::{OUTLIER_BYTES, UNIT_CHANNELS};
use kvquant_quant::{LayerFit, MixedFit, Side, SideFit, TOP, Table};

pub(crate) use books::Books;
use channel::{OUTLIERS, WIDTHS};

/// What an outlier takes in a block.
const OUTLIER_BITS: f64 = 8.0 * OUTLIER_BYTES as f64;

/// Four channels of a head that share a width.
struct Unit {
    channels: [u16; UNIT_CHANNELS],
    cost: [f64; WIDTHS],
}

/// Units of a side in the order of what they need, head by head.
fn units(books: &Books) -> Vec<Unit> {
    let mut units = Vec::new();
    for (head, channels) in books.channels.chunks_exact(books.head_dim).enumerate() {
        let mut order: Vec<usize> = (0..books.head_dim).collect();
        order.sort_by(|a, b| channels[*b].cost[2].total_cmp(&channels[*a].cost[2]));
        for four in order.as_chunks::<UNIT_CHANNELS>().0 {
            let cost = std::array::from_fn(|b| four.iter().map(|i| channels[*i].cost[b]).sum());
            units.push(Unit { channels: four.map(|i| (head * books.head_dim + i) as u16), cost });
        }
    }
    units
}

/// The cheapest width of a unit at a price of a bit; of equals the smaller.
fn cheapest(unit: &Unit, price: f64) -> usize {
    let total = |b: usize| unit.cost[b] + price * b as f64;
    (1..WIDTHS).fold(0, |best, b| if total(b) < total(best) { b } else { best })
}

/// Widths of all units with at most `budget` bits in all (a unit of width b counts b).
fn allocate(units: &[&Unit], budget: usize) -> Vec<u8> {
    let at = |price: f64| -> Vec<usize> { units.iter().map(|u| cheapest(u, price)).collect() };
    let top = units.iter().map(|u| u.cost[0]).fold(0.0, f64::max);
    // Between no bit for anybody and 7 for all that gain by them.
    let (mut low, mut high) = (1e-30f64.ln(), (top + 1e-30).ln() + 1.0);
    for _ in 0..100 {
        let price = (low + high) / 2.0;
        if at(price.exp()).iter().sum::<usize>() > budget { low = price } else { high = price }
    }
    let mut widths = at(high.exp());
    // What is left goes where a bit brings most.
    let mut left = budget - widths.iter().sum::<usize>().min(budget);
    while left > 0 {
        let gain = |i: usize| units[i].cost[widths[i]] - units[i].cost[widths[i] + 1];
        let open = (0..units.len()).filter(|&i| widths[i] + 1 < WIDTHS);
        let Some(best) = open.max_by(|&a, &b| gain(a).total_cmp(&gain(b))) else { break };
        widths[best] += 1;
        left -= 1;
    }
    widths.into_iter().map(|b| b as u8).collect()
}

/// Fits of all layers from the codebooks of their keys and values, with `hundredths` / 100 bits on average.
pub(crate) fn fits(layers: &[(Books, Books)], hundredths: u32) -> Vec<LayerFit> {
    let sides: Vec<&Books> = layers.iter().flat_map(|(k, v)| [k, v]).collect();
    let units: Vec<Vec<Unit>> = sides.iter().map(|b| units(b)).collect();
    let all: Vec<&Unit> = units.iter().flatten().collect();
    let for_codes = (f64::from(hundredths) / 100.0 - OUTLIER_BITS * OUTLIERS).max(0.0);
    let mut widths = &allocate(&all, (all.len() as f64 * for_codes) as usize)[..];
    let mut done = Vec::with_capacity(sides.len());
    for (books, units) in sides.iter().zip(&units) {
        let (own, rest) = widths.split_at(units.len());
        widths = rest;
        done.push(side_fit(books, units, own));
    }
    let mut done = done.into_iter();
    std::iter::from_fn(|| Some(LayerFit { keys: done.next()?, values: done.next()? })).collect()
}

fn side_fit(books: &Books, units: &[Unit], widths: &[u8]) -> SideFit {
    let (d, channels) = (books.head_dim, &books.channels);
    let mut of_channel = vec![0; channels.len()];
    for (unit, bits) in units.iter().zip(widths) {
        unit.channels.iter().for_each(|&c| of_channel[c as usize] = *bits);
    }
    let order = order(books, &of_channel);
    let mut tops: Vec<f32> = channels.iter().zip(&of_channel).map(|(c, bits)| c.top(*bits)).collect();
    if books.side == Side::Key {
        // A rotation mixes the channels of a pair: they share a step.
        tops.as_chunks_mut::<2>().0.iter_mut().for_each(|pair| *pair = [pair[0].max(pair[1]); 2]);
    }
    let mut fit = MixedFit {
        widths: order.iter().step_by(UNIT_CHANNELS).map(|c| of_channel[*c]).collect(),
        order: order.iter().map(|c| (c % d) as u16).collect(),
        steps: Vec::new(),
        posts: Vec::new(),
        transform: books.transform.clone(),
    };
    for &c in &order {
        let (top, bits) = (tops[c], of_channel[c]);
        let step = if top > 0.0 { (top / f32::from(TOP)).max(f32::MIN_POSITIVE) } else { 1.0 };
        let posts = channels[c].entries(bits, step);
        debug_assert_eq!(posts.len(), Table::entries(bits.into()));
        fit.steps.push(step);
        fit.posts.extend(posts);
    }
    let mut lower: Vec<f32> = channels.iter().map(|c| c.lower).collect();
    let mut upper: Vec<f32> = channels.iter().map(|c| c.upper).collect();
    if books.side == Side::Value {
        // Axes of a basis may have any order: that of their places, so that kernels need not look it up.
        fit.order = (0..order.len()).map(|place| (place % d) as u16).collect();
        fit.transform = order.iter().flat_map(|c| &books.transform[c * d..(c + 1) * d]).copied().collect();
        (lower, upper) = (order.iter().map(|c| lower[*c]).collect(), order.iter().map(|c| upper[*c]).collect());
    }
    SideFit { lower, upper, encode: Vec::new(), decode: Vec::new(), mixed: Some(fit) }
}

/// The channel of each place: within a head units of one width together, which are decoded as one run, wide ones first. Of
/// keys both channels of a RoPE pair side by side, where their widths are equal: such pairs need no room before they are
/// turned.
fn order(books: &Books, widths: &[u8]) -> Vec<usize> {
    let is_whole = |c: usize| books.side == Side::Key && widths[c] == widths[c ^ 1];
    let mut order: Vec<usize> = (0..widths.len()).collect();
    for head in order.chunks_exact_mut(books.head_dim) {
        head.sort_by_key(|&c| (std::cmp::Reverse(widths[c]), !is_whole(c)));
    }
    order
}

#[cfg(test)]
mod tests;
