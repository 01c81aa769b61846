#!/bin/sh
# adbd_root.sh FOLDER [ARCH]: a root file system with Debian's own adbd, for tests/bench/devices/test_android.py
# (EDGEFT_TEST_ADBD=FOLDER). Packages of Debian trixie for ARCH (arm64 unless said) are downloaded and unpacked; nothing
# of them is run or configured. Needs debootstrap and dpkg; as root, because packages name their owners.
set -eu
folder=${1:?a folder that is to be made} arch=${2:-arm64}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
debootstrap --download-only --arch="$arch" --variant=minbase --include=adbd trixie "$scratch" > /dev/null
mkdir -p "$folder"
for part in bin sbin lib; do
  mkdir -p "$folder/usr/$part"
  ln -sfn "usr/$part" "$folder/$part"
done
for package in "$scratch"/var/cache/apt/archives/*.deb; do
  dpkg-deb --fsys-tarfile "$package" | tar -x -C "$folder" --keep-directory-symlink
done
for part in proc sys dev tmp data/local/tmp; do mkdir -p "$folder/$part"; done
echo 'root:x:0:0:root:/:/bin/sh' > "$folder/etc/passwd"
echo 'root:x:0:' > "$folder/etc/group"
[ -e "$folder/bin/sh" ] || ln -s dash "$folder/bin/sh"
