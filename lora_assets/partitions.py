"""One partition per dataset date."""

import dagster as dg

from lora_assets.settings import load_settings

# Dynamic: only dates that have data exist, late dates are no special case, and today needs no end offset.
dataset_dates = dg.DynamicPartitionsDefinition(name=f"{load_settings().pipeline_name}_dataset_dates")
