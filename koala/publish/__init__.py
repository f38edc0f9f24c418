"""Release of a distilled student: gate, card, and the targets that it is sent to."""
