//! Which weights a model has: a stored cache continues bit for bit with the same ones only.

use sha2::{Digest, Sha256};

use crate::forward::Model;

impl Model {
    /// Hex SHA-256 over the fingerprint, the rotary positions, and of every matrix its type, its shape, and its first,
    /// middle and last row. Another quantization of the same model has another one, and so has a fine-tuned model.
    pub fn weights_sha256(&self) -> String {
        let mut hash = Sha256::new();
        let f = &self.fingerprint;
        let shape = [f.layers, f.kv_heads, f.head_dim, self.config.heads, self.config.hidden, self.config.vocab];
        hash.update(format!("{} {} {shape:?}", f.architecture, f.norms_sha256));
        for a in &self.attention {
            hash.update(format!("{:?}", a.window));
            a.rope.inv_freq.iter().for_each(|x| hash.update(x.to_le_bytes()));
        }
        let layers = self.layers.iter().flat_map(|l| [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down]);
        for w in layers.chain([&*self.embed, &*self.head]) {
            hash.update(format!("{:?} {} {}", w.ty(), w.rows(), w.cols()));
            let mut row = vec![0.0; w.cols()];
            for r in [0, w.rows() / 2, w.rows().saturating_sub(1)] {
                if r < w.rows() {
                    w.dequant_row(r, &mut row);
                    row.iter().for_each(|x| hash.update(x.to_le_bytes()));
                }
            }
        }
        hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
    }
}
