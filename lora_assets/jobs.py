"""What is run as one: the whole graph of a dataset date."""

import dagster as dg

# From exports to serving exports; research assets are started by hand.
train_and_export = dg.define_asset_job(
    "train_and_export",
    selection=dg.AssetSelection.groups("dataset", "training", "export"),
    description="Prepare, profile, plan, train, evaluate, register, merge, convert and export one dataset date.",
)
