"""Settings of databases."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from lora_assets.settings.values import SettingsGroup, pairs


class DatabaseSettings(SettingsGroup):
    """The run log's database, and the one that holds the loop's samples."""

    database_url: SecretStr | None = Field(
        None, description="PostgreSQL of the run log; unset: an embedded server under DATA_ROOT."
    )
    samples_database_url: SecretStr | None = Field(
        None, description="PostgreSQL of the loop's samples, for export-samples; unset: DATABASE_URL."
    )
    samples_table: str = Field(
        "brain_training_samples", min_length=1, description="Table of the loop's samples; a schema may precede it."
    )
    samples_columns: str = Field(
        "id=id,instruction=instruction,input=input,output=output",
        description="Comma-separated field=column: a record's fields and the table's columns.",
    )
    samples_time_column: str = Field(
        "created_at", min_length=1, description="The column that says when a sample was made."
    )

    @field_validator("samples_columns")
    @classmethod
    def _mapped_once(cls, value: str) -> str:
        fields = [field for field, _ in pairs(value)]
        if not fields or not all(field and column for field, column in pairs(value)):
            raise ValueError("write field=column, comma-separated, such as instruction=question,output=answer")
        if len(set(fields)) < len(fields):
            raise ValueError("a field stands there twice")
        return value

    @field_validator("database_url", "samples_database_url")
    @classmethod
    def _postgresql(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        try:
            parts = urlsplit(value.get_secret_value())
            good = parts.scheme.split("+")[0] in ("postgres", "postgresql") and parts.port != 0
        except ValueError:
            good = False
        if not good:
            raise ValueError("not the URL of a PostgreSQL server: postgresql://user:password@host:5432/database")
        return value

    @property
    def sample_columns(self) -> dict[str, str]:
        """A record's fields and the columns of the loop's table that hold them."""
        return dict(pairs(self.samples_columns))

    @property
    def samples_url(self) -> str | None:
        """The server of the loop's samples, if one is named."""
        url = self.samples_database_url or self.database_url
        return url.get_secret_value() if url else None
