#!/bin/sh
# On the machine `server`: serve an image, from now on and after each boot.
set -eu

[ -e /srv/data.img ] || truncate -s 256M /srv/data.img
cat >/etc/systemd/system/served.service <<'UNIT'
[Unit]
Description=The export of the tests
After=network.target

[Service]
Type=notify
NotifyAccess=all
ExecStart=/usr/local/bin/nbdlink serve -f raw -x data --signature vagrant /srv/data.img
Restart=always
RestartSec=1

[Install]
WantedBy=multi-user.target
UNIT
systemctl daemon-reload
systemctl enable served.service
systemctl restart served.service
