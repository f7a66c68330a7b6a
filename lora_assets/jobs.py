"""What is run as one: the whole graph of a dataset date; the champion's look at what arrived since."""

import dagster as dg

# From exports to serving exports; research assets are started by hand.
train_and_export = dg.define_asset_job(
    "train_and_export",
    selection=dg.AssetSelection.groups("dataset", "training", "export"),
    description="Prepare, profile, plan, train, evaluate, register, merge, convert and export one dataset date.",
)

champion_drift = dg.define_asset_job(
    "champion_drift",
    selection=dg.AssetSelection.groups("monitoring"),
    description="Evaluate the champion on all held-out data that arrived since its training.",
)
