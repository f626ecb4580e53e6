//! One question: a text that hides its answer.

use kvquant_model::template::Message;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::{RetrievalError, Text};

/// What is hidden in the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// A number.
    Passkey,
    /// Numbers under names, one of which is asked for.
    Multikey,
}

/// Names that numbers have.
const NAMES: [&str; 12] =
    ["Ada", "Boris", "Clara", "Dario", "Edith", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Leo"];
/// Names of one text.
const PAIRS: usize = 4;

/// A prompt and its answer.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Case {
    /// Up to where the number follows.
    pub prompt: Vec<u32>,
    /// The number as the tokens that follow.
    pub number: Vec<u32>,
    /// The number.
    pub digits: String,
}

/// Makes cases of a task.
pub(super) struct Builder<'a> {
    text: &'a Text<'a>,
    task: Task,
    sentences: Vec<&'a str>,
    /// Tokens of each sentence, about.
    sizes: Vec<usize>,
}

/// What one case says: facts (the first is asked for), question, beginning of the answer.
struct Words {
    facts: Vec<String>,
    question: String,
    answer: String,
    digits: String,
}

impl<'a> Builder<'a> {
    pub fn new(text: &'a Text<'a>, task: Task) -> Result<Self, RetrievalError> {
        let sentences: Vec<&str> = text.filler.split_inclusive(". ").flat_map(str::lines).map(str::trim).collect();
        let sentences: Vec<&str> = sentences.into_iter().filter(|s| s.ends_with('.')).collect();
        if sentences.is_empty() {
            return Err(RetrievalError::NoFiller);
        }
        let size = |s: &&str| Ok(text.tokenizer.encode(&format!(" {s}"), false)?.len());
        let sizes = sentences.iter().map(size).collect::<Result<_, RetrievalError>>()?;
        Ok(Builder { text, task, sentences, sizes })
    }

    /// A prompt of at most `length` tokens with the fact at `depth` percent of its text.
    pub fn case(&self, length: usize, depth: usize, seed: u64) -> Result<Case, RetrievalError> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let words = self.words(&mut rng);
        let start = rng.random_range(0..self.sentences.len());
        let others: Vec<f64> = words.facts[1..].iter().map(|_| rng.random_range(0.0..1.0)).collect();
        let render = |n: usize| self.render(&words, start, n, depth, &others);
        let bare = render(0)?.prompt.len();
        // An estimate by sentences, then as it is.
        let (mut n, mut tokens) = (0, bare);
        while tokens <= length {
            tokens += self.sizes[(start + n) % self.sizes.len()];
            n += 1;
        }
        loop {
            let case = render(n)?;
            if case.prompt.len() <= length {
                return Ok(case);
            }
            if n == 0 {
                let problem = format!("a prompt without any filler has {bare} tokens already");
                return Err(RetrievalError::Option { what: "lengths", got: length, problem });
            }
            n -= 1;
        }
    }

    fn words(&self, rng: &mut ChaCha8Rng) -> Words {
        let mut number = || rng.random_range(10_000..100_000).to_string();
        match self.task {
            Task::Passkey => {
                let digits = number();
                Words {
                    facts: vec![format!("The secret number is {digits}. Remember it.")],
                    question: "What is the secret number? It is mentioned in the text.".into(),
                    answer: "The secret number is".into(),
                    digits,
                }
            }
            Task::Multikey => {
                let numbers: Vec<String> = (0..PAIRS).map(|_| number()).collect();
                let mut names = NAMES;
                names.shuffle(rng);
                let facts = names.iter().zip(&numbers).map(|(name, n)| format!("The number of {name} is {n}."));
                Words {
                    facts: facts.collect(),
                    question: format!("What is the number of {}? It is mentioned in the text.", names[0]),
                    answer: format!("The number of {} is", names[0]),
                    digits: numbers[0].clone(),
                }
            }
        }
    }

    /// With `n` sentences of filler from `start` on; `others` are the depths of the facts that are not asked for.
    fn render(
        &self,
        words: &Words,
        start: usize,
        n: usize,
        depth: usize,
        others: &[f64],
    ) -> Result<Case, RetrievalError> {
        let place = |share: f64| (share * n as f64).round() as usize;
        let depths = std::iter::once(depth as f64 / 100.0).chain(others.iter().copied());
        let places: Vec<usize> = depths.map(place).collect();
        let mut text = Vec::new();
        for i in 0..=n {
            text.extend(words.facts.iter().zip(&places).filter(|(_, at)| **at == i).map(|(fact, _)| fact.as_str()));
            if i < n {
                text.push(self.sentences[(start + i) % self.sentences.len()]);
            }
        }
        let content = format!("{}\n\n{}", text.join(" "), words.question);
        let chat = self.text.template.render(&[Message { role: "user".into(), content }], true)?;
        let asked = self.encode(&format!("{chat}{}", words.answer))?;
        let whole = self.encode(&format!("{chat}{} {}", words.answer, words.digits))?;
        // Where a token spans question and number, the number begins with it.
        let common = asked.iter().zip(&whole).take_while(|(a, b)| a == b).count();
        Ok(Case { prompt: whole[..common].to_vec(), number: whole[common..].to_vec(), digits: words.digits.clone() })
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, RetrievalError> {
        let ids = self.text.tokenizer.encode(text, true)?;
        let bos = self.text.bos.filter(|bos| ids.first() != Some(bos));
        Ok(bos.into_iter().chain(ids).collect())
    }
}
