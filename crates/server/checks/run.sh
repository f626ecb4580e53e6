#!/usr/bin/env bash
# Checks a running server's outside with programs that are not ours: the official OpenAI client, the documentation's curl
# examples, schemathesis on the API's description, and, where chromium and chromedriver are installed, the page in a browser;
# and that a second question on a long document needs no second reading.
#
#   crates/server/checks/run.sh [kvquant binary]     default: target/release/kvquant
set -euo pipefail
cd "$(dirname "$0")/../../.."
binary=${1:-${CARGO_TARGET_DIR:-target}/release/kvquant}
folder=${CARGO_TARGET_DIR:-target}/server-checks
mkdir -p "$folder"
if [ ! -x "$folder/venv/bin/schemathesis" ]; then
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'openai>=2,<4' 'schemathesis>=4,<5' 'selenium>=4,<5'
fi
server=
trap '[ -z "$server" ] || { kill "$server" 2>/dev/null; wait "$server" 2>/dev/null || true; }' EXIT

# Starts a server with these arguments in place of the one before; $url is where it is.
serve() {
  if [ -n "$server" ]; then
    kill "$server"
    wait "$server" || true
  fi
  : >"$folder/ready"
  RUST_LOG=warn "$binary" serve smollm2-135m --port 0 --kv nuq3-1%+sink1 --kv-memory 200M --default-max-tokens 64 "$@" \
    >"$folder/ready" &
  server=$!
  for _ in $(seq 300); do
    grep -q '^ready at ' "$folder/ready" && break
    kill -0 "$server" || { echo "the server ended" >&2; exit 1; }
    sleep 0.2
  done
  url=$(sed -n 's/^ready at //p' "$folder/ready")
  [ -n "$url" ] || { echo "the server was not ready after a minute" >&2; exit 1; }
}

serve
echo "-- a long document, asked twice"
python3 crates/server/checks/prefix.py "$url" crates/cli/assets/station.txt

serve --ctx 2048
echo "-- OpenAI client"
"$folder/venv/bin/python" crates/server/checks/client.py "$url"

echo "-- curl examples of README.md and docs/server.md"
for file in README.md docs/server.md; do
  # A command goes on while its lines end with a backslash.
  awk '/^curl / { on = 1 } on { print } !/\\$/ { on = 0 }' "$file" |
    sed -e "s|http://127.0.0.1:8080|$url|" -e 's/^curl /curl --silent --show-error --fail /' >"$folder/examples.sh"
  bash -e "$folder/examples.sh" >"$folder/examples.out"
  grep -q '"content"' "$folder/examples.out" || { echo "no answer to the examples of $file" >&2; exit 1; }
done
grep -q '^data: \[DONE\]' "$folder/examples.out" || { echo "a streamed example did not end" >&2; exit 1; }

echo "-- schemathesis"
# Answers of 4 tokens are enough: it asks thousands of questions.
"$folder/venv/bin/schemathesis" --config-file crates/server/checks/schemathesis.toml run "$url/openapi.json" --url "$url" \
  >"$folder/schemathesis.log" 2>&1 || { tail -60 "$folder/schemathesis.log"; exit 1; }
tail -4 "$folder/schemathesis.log"
curl --silent --fail "$url/health" >/dev/null

if command -v chromedriver >/dev/null && command -v chromium >/dev/null; then
  echo "-- page"
  "$folder/venv/bin/python" crates/server/checks/page.py "$url" "$folder/page.png"
else
  echo "-- page: skipped, chromium and chromedriver are not installed"
fi
