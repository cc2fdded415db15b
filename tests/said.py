"""What a reader says of a record, less what it says of the amplitude: numbers made up for a test are seldom an ECG's."""


def said(record):
    """Return the warnings of a record without the one about its amplitude."""
    return [warning for warning in record.warnings if "an ECG over 0.1 to 10 mV" not in warning]
