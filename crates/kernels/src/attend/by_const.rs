//! Widths and numbers of rows as const arguments, so that loops over them unroll.

use kvquant_quant::pack::VECTOR;

use super::view::Run;

/// Calls a function with a run's width as its const argument.
macro_rules! by_width {
    ($run:expr, $f:ident::<_ $(, $g:tt)*>($($x:expr),* $(,)?)) => {
        match $run.bits {
            0 => $f::<0 $(, $g)*>($($x),*),
            1 => $f::<1 $(, $g)*>($($x),*),
            2 => $f::<2 $(, $g)*>($($x),*),
            3 => $f::<3 $(, $g)*>($($x),*),
            4 => $f::<4 $(, $g)*>($($x),*),
            5 => $f::<5 $(, $g)*>($($x),*),
            6 => $f::<6 $(, $g)*>($($x),*),
            _ => $f::<7 $(, $g)*>($($x),*),
        }
    };
}
pub(super) use by_width;

/// Calls a function with a number of rows, 1 to 4, as its const argument.
macro_rules! by_rows {
    ($n:expr, $f:ident::<_ $(, $g:tt)*>($($x:expr),* $(,)?)) => {
        match $n {
            1 => $f::<1 $(, $g)*>($($x),*),
            2 => $f::<2 $(, $g)*>($($x),*),
            3 => $f::<3 $(, $g)*>($($x),*),
            _ => $f::<4 $(, $g)*>($($x),*),
        }
    };
}
pub(super) use by_rows;

/// Units of a run: number of the unit, its vectors.
#[inline(always)]
pub(super) fn units<'a, const B: u32>(run: &Run<'a>) -> impl Iterator<Item = (usize, &'a [[u8; VECTOR]])> {
    let vectors = run.vectors;
    run.units.clone().enumerate().map(move |(i, u)| (u, &vectors[i * B as usize..][..B as usize]))
}
