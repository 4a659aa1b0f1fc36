"""The commands under which a damaged file is read."""

from dataclasses import dataclass

from tests.fuzz import decisions
from tests.fuzz.server import Action


@dataclass(frozen=True)
class Verb:
    """`shows`: it only shows, so it must survive any one bad file. `prints`: its figures are what it prints."""

    call: str
    shows: bool = False
    prints: bool = False
    light: bool = False  # it does not load torch: a case takes a fraction of the time
    slow: bool = False  # it takes its turn more rarely
    limit_s: float = 15.0

    @property
    def action(self) -> Action:
        """Words of the command line; of what no verb does, a function."""
        return getattr(decisions, self.call) if hasattr(decisions, self.call) else self.call.split()


VERBS = {
    "train": Verb("train tiny.yaml --run-dir runs/one train.max_images=64", slow=True),
    "train new": Verb("train tiny.yaml --run-dir runs/new train.max_images=16"),
    "train --dry-run": Verb("train tiny.yaml --run-dir runs/one --dry-run", prints=True, light=True),
    "train --init-from": Verb(
        "train tiny.yaml --run-dir runs/new --init-from w.safetensors train.max_images=16", slow=True
    ),
    "sample": Verb("sample runs/one --out new --num 2"),
    "sample (more)": Verb("sample runs/one --out drawn --num 4"),
    "sample (file)": Verb("sample w.safetensors --out new --num 2"),
    "sample (folder)": Verb("sample hub --out new --num 2"),
    "sample (pth)": Verb("sample w.pth --out new --num 2 --noise-std 0.1"),
    "evaluate": Verb("evaluate runs/one", slow=True),
    "evaluate (auto)": Verb("evaluate runs/one --images 16 sampling.method=auto", slow=True),
    "evaluate (png)": Verb("evaluate runs/one --images 48 --save png"),
    "evaluate (shards)": Verb("evaluate runs/one --images 32 --save shards"),
    "evaluate (file)": Verb(
        "evaluate w.safetensors --out new data.train=set/train train.noise_std=0.1 evaluation.num_samples=8 evaluation.grid=[2,2]",
        slow=True,
    ),
    "evaluate --watch": Verb("evaluate runs/one --watch --poll 0.01 --idle-limit 0.005", slow=True),
    "sweep-guidance": Verb("sweep-guidance runs/one --guidance 0,1 --start 4 --final 8", slow=True),
    "score": Verb("score images/a --reference ref.npz --out new.json", prints=True),
    "score (theirs)": Verb(
        "score images/a --reference theirs.npz --features fid_inception --out new.json", prints=True
    ),
    "score (pickle)": Verb(
        "score images/a --reference theirs.pkl --features fid_inception --out new.json", prints=True
    ),
    "score (torch)": Verb("score images/a --reference theirs.pt --features fid_inception --out new.json", prints=True),
    "score (state)": Verb("score images/a --reference theirs.pth --features fid_inception --out new.json", prints=True),
    "score (array)": Verb("score array.npz --reference ref.npz --out new.json", prints=True),
    "likelihood": Verb("likelihood runs/one set/val --out new", prints=True),
    "likelihood (again)": Verb("likelihood runs/one set/val --out lik", prints=True),
    "encode": Verb("encode runs/one set/val --out new", prints=True),
    "encode (again)": Verb("encode runs/one set/val --out lat", prints=True),
    "decode": Verb("decode runs/one lat --out new", prints=True),
    "decode (again)": Verb("decode runs/one lat --out dec", prints=True),
    "reference": Verb("reference set/train --size 8 --channels 1 --out new.npz"),
    "report": Verb("report runs/one --out new.html", shows=True, light=True, slow=True),
    "status": Verb("status runs", shows=True, prints=True, light=True),
    "logs": Verb("logs runs/one", prints=True, light=True),
    "cancel": Verb("cancel runs/one --wait 0.1", prints=True, light=True),
    "submit --dry-run": Verb(
        "submit tiny.yaml --run-dir runs/one --profile profile.yaml --dry-run", prints=True, light=True
    ),
    "submit": Verb(
        "submit tiny.yaml --run-dir runs/one --profile profile.yaml --after-running", prints=True, light=True, slow=True
    ),
    "checkpoint list": Verb("checkpoint list runs/one", shows=True, prints=True, light=True),
    "checkpoint verify": Verb("checkpoint verify runs/one", prints=True, light=True),
    "checkpoint export": Verb("checkpoint export runs/one --out new.safetensors"),
    "checkpoint prune": Verb("checkpoint prune runs/one --keep-latest 2", prints=True, light=True),
    "checkpoint rewind": Verb("checkpoint rewind runs/one --images 32", light=True),
    "ema": Verb("ema runs/one --relative-std 0.11 --out new.safetensors", slow=True),
    "data info": Verb("data info set/train", prints=True, light=True),
    "data verify": Verb("data verify set/train --processes 1 --report new.json", light=True),
    "data index": Verb("data index set/train --out new", light=True),
    "data info (mds)": Verb("data info mds", prints=True, light=True),
    "data verify (mds)": Verb("data verify mds --processes 1 --report new.json", light=True),
    "data index (mds)": Verb("data index mds --out new", light=True),
    "train new (mds)": Verb("train tiny.yaml --run-dir runs/new train.max_images=16 data.train=mds", slow=True),
    "data prepare": Verb("data prepare images new --size 8"),
    "data prepare (classes)": Verb("data prepare images new --size 8 --classes names.json"),
    "data prepare (npz)": Verb("data prepare sources/arrays.npz new --size 8"),
    "data prepare (parquet)": Verb("data prepare sources/table.parquet new --size 8"),
    "data prepare (edm)": Verb("data prepare edm new --size 8"),
    "data prepare (idx)": Verb("data prepare idx new --size 8"),
    "data prepare (rows)": Verb("data prepare rows new --size 8"),
    "data prepare (formats)": Verb("data prepare formats new --size 8 --channels 3"),
    "score (formats)": Verb("score formats --against formats --size 8 --out new.json", prints=True),
    "sample (classes)": Verb("sample w.safetensors --out new --num 2 --classes names.json --labels b"),
    "requeue": Verb("requeue", prints=True, light=True),
    "meet": Verb("meet", prints=True, light=True),
}
