//! Tokens' bytes to text that can be shown.

/// Bytes to text: holds back an unfinished character and what may become a stop string.
#[derive(Debug)]
pub struct TextStream {
    stop: Vec<String>,
    bytes: Vec<u8>,
    text: String,
    sent: usize,
}

impl TextStream {
    /// A text that ends before the first of the strings `stop`; empty ones end nothing.
    pub fn new(mut stop: Vec<String>) -> Self {
        stop.retain(|s| !s.is_empty());
        TextStream { stop, bytes: Vec::new(), text: String::new(), sent: 0 }
    }

    /// Adds a token's bytes; returns whether a stop string is complete.
    pub fn push(&mut self, bytes: &[u8]) -> bool {
        self.bytes.extend_from_slice(bytes);
        let whole = match std::str::from_utf8(&self.bytes) {
            Ok(_) => self.bytes.len(),
            Err(e) if e.error_len().is_none() => e.valid_up_to(),
            // Bytes that can't become a character are replaced.
            Err(_) => self.bytes.len(),
        };
        let fresh: Vec<u8> = self.bytes.drain(..whole).collect();
        self.text.push_str(&String::from_utf8_lossy(&fresh));
        let end = self.stop.iter().filter_map(|s| self.text[self.sent..].find(s.as_str())).min();
        if let Some(end) = end {
            self.text.truncate(self.sent + end);
        }
        end.is_some()
    }

    /// Text that is ready to be shown.
    pub fn ready(&mut self, all: bool) -> &str {
        let held = if all {
            0
        } else {
            let tail = &self.text[self.sent..];
            let starts = |s: &String| (1..s.len()).rev().find(|&n| s.is_char_boundary(n) && tail.ends_with(&s[..n]));
            self.stop.iter().filter_map(starts).max().unwrap_or(0)
        };
        let (from, to) = (self.sent, self.text.len() - held);
        self.sent = to.max(from);
        &self.text[from..self.sent]
    }

    /// All of the text so far.
    pub fn into_text(self) -> String {
        self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stop: &[&str], pieces: &[&[u8]]) -> (String, Vec<String>, bool) {
        let mut s = TextStream::new(stop.iter().map(|s| s.to_string()).collect());
        let mut shown = vec![];
        let mut stopped = false;
        for p in pieces {
            stopped = s.push(p);
            if stopped {
                break;
            }
            shown.push(s.ready(false).to_string());
        }
        shown.push(s.ready(true).to_string());
        (s.into_text(), shown, stopped)
    }

    #[test]
    fn characters_come_whole_and_stop_strings_never_show() {
        let (text, shown, _) = run(&[], &[&[0xF0, 0x9F], &[0x99], &[0x82], b"!"]);
        assert_eq!((text.as_str(), shown), ("🙂!", vec!["".into(), "".into(), "🙂".into(), "!".into(), "".into()]));
        let (text, shown, stopped) = run(&["END", "E!"], &[b"a E", b"N", b"x E", b"ND z"]);
        assert!(stopped);
        assert_eq!(text, "a ENx ");
        assert_eq!(shown.concat(), "a ENx ");
        assert_eq!(shown[0], "a ");
        let (text, _, _) = run(&[], &[&[0xFF], b"a"]);
        assert_eq!(text, "\u{FFFD}a");
    }
}
