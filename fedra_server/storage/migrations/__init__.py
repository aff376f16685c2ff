"""The steps that bring an older database up to the schema of this version, run by Alembic."""
