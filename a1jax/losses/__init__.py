"""Losses: functions of arrays. They know no models; a stage brings hidden states, output matrices, targets and masks."""
