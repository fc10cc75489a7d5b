"""From what was asked for to segments: which adapter serves which rows. Knows neither weights nor layers."""
