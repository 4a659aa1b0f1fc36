"""`plain_training.py CURVE.npz`: the golden training curve by a plain torch loop over `tarflow.TarFlow`.

Prints the largest relative error of the twenty losses and of the probe.
"""

import json
import sys

import numpy as np
import torch

import tarflow
from tarflow.models.flow import flow_loss

with np.load(sys.argv[1]) as file:
    golden = {name: file[name] for name in file.files}
settings = json.loads(str(golden.pop("config")))
settings["image_size"] = settings.pop("img_size")
data = {name: torch.from_numpy(array) for name, array in golden.items()}

model = tarflow.TarFlow(tarflow.TarFlowConfig(**settings))
model.load_state_dict({n.removeprefix("param/"): array for n, array in data.items() if n.startswith("param/")})
optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=1e-4)
losses = []
for step, lr in enumerate(data["lr_per_step"].tolist()):
    labels = torch.where(data["label_dropped"][step], -1, data["y"][step])
    noisy = data["x"][step] + data["noise_std"].float() * data["gaussian"][step]
    loss = flow_loss(*model(noisy, labels)).mean()
    loss.backward()
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

z, _ = model(data["x"][0], data["y"][0])
errors = [
    np.abs(np.array(losses) / golden["loss"] - 1).max(),
    np.abs(z.detach().numpy() - golden["probe_z"]).max() / np.abs(golden["probe_z"]).max(),
]
print(json.dumps({"steps": len(losses), "error": float(max(errors))}))
