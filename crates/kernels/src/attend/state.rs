//! Partial attention: what a set of tokens contributes, in a form that merges.

/// Attention of `rows` query rows over some of the tokens.
///
/// For a row with scores s_t: m = max s_t, l = sum exp(s_t - m), o = sum exp(s_t - m) v_t. The empty state is
/// m = -inf, l = 0, o = 0. Merging is associative and commutative up to rounding.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct State {
    head_dim: usize,
    /// Running maximum `[rows]`.
    pub max: Vec<f32>,
    /// Sum of exponentials `[rows]`.
    pub sum: Vec<f32>,
    /// Unnormalised output `[rows, head_dim]`.
    pub out: Vec<f32>,
}

impl State {
    /// The state of no tokens.
    pub fn empty(rows: usize, head_dim: usize) -> Self {
        State { head_dim, max: vec![f32::NEG_INFINITY; rows], sum: vec![0.0; rows], out: vec![0.0; rows * head_dim] }
    }

    /// Becomes the state of no tokens, in the memory that it has.
    pub fn reset(&mut self, rows: usize, head_dim: usize) {
        self.head_dim = head_dim;
        for (list, n, value) in [
            (&mut self.max, rows, f32::NEG_INFINITY),
            (&mut self.sum, rows, 0.0),
            (&mut self.out, rows * head_dim, 0.0),
        ] {
            list.clear();
            list.resize(n, value);
        }
    }

    /// Query rows.
    pub fn rows(&self) -> usize {
        self.max.len()
    }

    /// Channels of a head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Folds the state of other tokens, for the same rows, into this one.
    pub fn merge(&mut self, other: &State) {
        assert_eq!(self.rows(), other.rows(), "states of the same rows");
        self.merge_from(0, other);
    }

    /// Folds a state of some rows, which are those from `first` on here, into this one.
    pub fn merge_from(&mut self, first: usize, other: &State) {
        assert!(first + other.rows() <= self.rows(), "states of the same rows");
        assert_eq!(self.head_dim, other.head_dim, "states of heads of one size");
        for s in 0..other.rows() {
            let r = first + s;
            let max = self.max[r].max(other.max[s]);
            if max == f32::NEG_INFINITY {
                continue;
            }
            let (a, b) = ((self.max[r] - max).exp(), (other.max[s] - max).exp());
            self.max[r] = max;
            self.sum[r] = self.sum[r] * a + other.sum[s] * b;
            let d = self.head_dim;
            for (o, p) in self.out[r * d..(r + 1) * d].iter_mut().zip(&other.out[s * d..(s + 1) * d]) {
                *o = *o * a + *p * b;
            }
        }
    }

    /// The attention output of a row, `[head_dim]`; zeros if the row saw no token.
    pub fn finish(&self, row: usize, out: &mut [f32]) {
        let scale = if self.sum[row] > 0.0 { 1.0 / self.sum[row] } else { 0.0 };
        let d = self.head_dim;
        for (to, o) in out.iter_mut().zip(&self.out[row * d..(row + 1) * d]) {
            *to = o * scale;
        }
    }

    /// Moves a row's maximum up to `max` and returns it; rescales what was summed under the old one.
    pub(super) fn raise(&mut self, row: usize, max: f32) -> f32 {
        if max > self.max[row] {
            let factor = (self.max[row] - max).exp();
            self.sum[row] *= factor;
            let d = self.head_dim;
            for o in &mut self.out[row * d..(row + 1) * d] {
                *o *= factor;
            }
            self.max[row] = max;
        }
        self.max[row]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(scores: &[f32]) -> State {
        let mut s = State::empty(1, 2);
        for (i, &x) in scores.iter().enumerate() {
            let v = [i as f32, 1.0 - x];
            let one = State { head_dim: 2, max: vec![x], sum: vec![1.0], out: v.to_vec() };
            s.merge(&one);
        }
        s
    }

    fn close(a: &State, b: &State) -> bool {
        let (mut x, mut y) = ([0.0; 2], [0.0; 2]);
        a.finish(0, &mut x);
        b.finish(0, &mut y);
        x.iter().zip(&y).all(|(p, q)| (p - q).abs() <= 1e-4 * (1.0 + q.abs()))
    }

    /// Scores of up to 8 tokens, of usual size and far beyond.
    fn scores() -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(prop_oneof![3 => -60f32..60.0, 1 => -1e6f32..1e6], 0..9)
    }

    proptest! {
        #[test]
        fn merge_is_associative_and_commutative(a in scores(), b in scores(), c in scores()) {
            let (sa, sb, sc) = (of(&a), of(&b), of(&c));
            let mut left = sa.clone();
            left.merge(&sb);
            left.merge(&sc);
            let mut right = sc.clone();
            right.merge(&sb);
            let mut turned = sa.clone();
            turned.merge(&right);
            prop_assert!(close(&left, &turned));
            right.merge(&sa);
            prop_assert!(close(&left, &right));
        }
    }

    #[test]
    fn the_empty_state_is_neutral() {
        let mut e = State::empty(1, 2);
        let s = of(&[3.0, -1.0]);
        e.merge(&s);
        assert_eq!(e, s);
        let mut out = [9.0; 2];
        State::empty(1, 2).finish(0, &mut out);
        assert_eq!(out, [0.0; 2]);
    }
}
