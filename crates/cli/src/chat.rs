//! `kvquant chat`: the cache is kept from turn to turn.

use std::io::{BufRead, Write};
use std::sync::atomic::Ordering;

use anyhow::Result;
use kvquant_model::template::Message;

use crate::generate::{AT_PROMPT, Common, Session, interrupted, to_stdout};

#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  kvquant chat smollm2-135m --kv mix3+sink1+recent32 --temperature 0.7 --top-p 0.9\n\nIn the chat: /reset begins anew, /stats shows the cache, /exit ends. Ctrl-C ends an answer; at the prompt it ends the chat."
)]
pub struct Args {
    #[command(flatten)]
    common: Common,
}

pub fn run(args: Args) -> Result<()> {
    let mut session = args.common.session()?;
    let template = session.loaded.template()?;
    let mut messages = args.common.opening();
    // What the cache holds: the next prompt is compared with it, and only what differs is run.
    let mut held: Vec<u32> = Vec::new();
    interrupted()?;
    eprintln!("{} with a {} cache. /reset, /stats, /exit", session.loaded.name, session.spec);
    let mut line = String::new();
    loop {
        eprint!("> ");
        std::io::stderr().flush()?;
        line.clear();
        AT_PROMPT.store(true, Ordering::Relaxed);
        let read = std::io::stdin().lock().read_line(&mut line)?;
        AT_PROMPT.store(false, Ordering::Relaxed);
        match line.trim() {
            _ if read == 0 => return Ok(()),
            "" => continue,
            "/exit" => return Ok(()),
            "/reset" => {
                messages = args.common.opening();
                session.sequence().truncate(0)?;
                held.clear();
                continue;
            }
            "/stats" => {
                let sequence = session.sequence();
                let (n, size) = (sequence.len(), sequence.size()?);
                drop(sequence);
                let parts = session.parts().map_or(String::new(), |b| format!(": {b:?}"));
                eprintln!("{n} tokens, {} bytes, {:.2} bits per element{parts}", size.bytes, size.bits_per_element);
                continue;
            }
            text => messages.push(Message { role: "user".into(), content: text.into() }),
        }
        if let Err(e) = turn(&mut session, &template, &mut messages, &mut held) {
            // The chat goes on without the message that failed.
            messages.pop();
            eprintln!("error: {}", crate::failure::describe(&e));
            if crate::failure::is_broken_pipe(&e) {
                return Err(e);
            }
        }
    }
}

fn turn(
    session: &mut Session,
    template: &kvquant_model::ChatTemplate,
    messages: &mut Vec<Message>,
    held: &mut Vec<u32>,
) -> Result<()> {
    let ids = session.encode(&template.render(messages, true)?, true)?;
    // At least one token is run, so that there are logits.
    let common = ids.iter().zip(held.iter()).take_while(|(a, b)| a == b).count().min(ids.len() - 1);
    // Layers with a window can only go back so far, codes on a GPU block by block.
    let mut sequence = session.sequence();
    let common = sequence.keepable(common);
    sequence.truncate(common)?;
    drop(sequence);
    held.truncate(common);
    let outcome = session.answer(&ids[common..], &mut to_stdout);
    // A failed prompt leaves the chunks that were done.
    held.extend_from_slice(&ids[common..]);
    let len = session.sequence().len();
    held.truncate(len);
    let outcome = outcome?;
    held.extend(outcome.tokens.iter().copied().take(len - held.len()));
    to_stdout("\n")?;
    eprintln!("[{}]", session.figures(&outcome)?);
    messages.push(Message { role: "assistant".into(), content: outcome.text });
    Ok(())
}
