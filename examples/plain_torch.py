"""HiFT in a plain torch loop, with a checkpoint in the middle of a sweep."""

import io

import torch
from torch import nn

from lightning_hift import HiFTEngine, SweepLR


def build() -> tuple[nn.Module, HiFTEngine, SweepLR]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.Sequential(
        nn.Embedding(64, 32), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Linear(32, 64)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = HiFTEngine.attach(model, optimizer, order="top2down", steps_per_group=2)
    scheduler = SweepLR(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60), engine)
    return model, engine, scheduler


def train(model: nn.Module, engine: HiFTEngine, scheduler: SweepLR, steps: range) -> float:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(64, (8, 1), generator=generator) + torch.arange(13)  # the next token is one more
        logits = model(tokens[:, :-1] % 64)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten() % 64)
        loss.backward()
        engine.optimizer.step()
        scheduler.step()
        if step % 10 == 0:
            print(f"step {step:3d}  sweep {engine.sweep}  next {engine.active_group.name:20}  loss {loss.item():.3f}")
    return loss.item()


run = build()
uninterrupted = train(*run, range(60))

model, engine, scheduler = build()
train(model, engine, scheduler, range(33))
file = io.BytesIO()
torch.save([model.state_dict(), engine.optimizer.state_dict(), scheduler.state_dict()], file)

file.seek(0)
weights, optimizer_state, scheduler_state = torch.load(file, weights_only=True)
model, engine, scheduler = build()
model.load_state_dict(weights)
engine.optimizer.load_state_dict(optimizer_state)
scheduler.load_state_dict(scheduler_state)
resumed = train(model, engine, scheduler, range(33, 60))
print(f"final loss: uninterrupted {uninterrupted!r}, resumed {resumed!r}")
assert resumed == uninterrupted
