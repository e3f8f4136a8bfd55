"""Serving on Ray Serve: the HTTP interface, and the deployments behind it.

`config` the application's arguments; `schema` the HTTP shapes; `http` the routes, `middleware` and `auth` in front of
them; `search` the fan-out over `shard` and `encoder` deployments; `app` puts it together (`build_app`).
"""
