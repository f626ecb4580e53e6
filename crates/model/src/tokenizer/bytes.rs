//! Byte-level tokens spell each byte as a printable letter: printable Latin-1 as itself, the others in order from
//! U+0100 on (GPT-2).

fn printable(b: u8) -> bool {
    matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// The bytes that a token's letters stand for; a letter outside the alphabet stands for its own UTF-8.
pub(super) fn from_letters(token: &str, out: &mut Vec<u8>) {
    for ch in token.chars() {
        match byte(ch) {
            Some(b) => out.push(b),
            None => out.extend_from_slice(ch.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

fn byte(ch: char) -> Option<u8> {
    match u32::from(ch) {
        c @ 0..=0xFF => u8::try_from(c).ok().filter(|b| printable(*b)),
        // The n-th letter from U+0100 is the n-th byte that is not printable: 0 to 0x20, 0x7F to 0xA0, 0xAD.
        c @ 0x100..=0x120 => u8::try_from(c - 0x100).ok(),
        c @ 0x121..=0x142 => u8::try_from(c - 0x121 + 0x7F).ok(),
        0x143 => Some(0xAD),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_one_letter() {
        let mut next = 0x100;
        for b in 0..=255u8 {
            let letter = if printable(b) {
                char::from(b)
            } else {
                next += 1;
                char::from_u32(next - 1).expect("below the surrogates")
            };
            assert_eq!(byte(letter), Some(b));
        }
        assert_eq!(next, 0x144);
        assert_eq!(byte('\u{144}'), None);
        assert_eq!(byte(' '), None);
    }
}
