"""From a call of the model to its layers: finding layers, and letting methods take ids."""
