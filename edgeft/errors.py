"""The errors a user can cause: each says what was found, what was expected and what to do."""

from __future__ import annotations


class EdgeftError(Exception):
    """A problem the user can solve. `cli.main` prints it and exits with code 2.

    `message` says what was found and what was expected; `hint` says what to do.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  -> {self.hint}" if self.hint else self.message


class RecipeError(EdgeftError):
    """A recipe that cannot be read or does not fit the schema; lists all problems at once."""


class DataError(EdgeftError):
    """User rows that cannot be used: names the file and the line."""


class ModelError(EdgeftError):
    """A base model, tokenizer or adapter that is missing, altered or of an unsupported kind."""


class ArtifactError(EdgeftError):
    """An artifact that is missing, incomplete or changed on disk."""


class ParityError(EdgeftError):
    """An exported or merged model that does not agree with the one it came from."""
