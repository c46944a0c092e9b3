#!/usr/bin/env bash
# The AMX kernels on an emulated processor that has AMX: Bochs' Sapphire Rapids, for machines without it. Boots Debian 13's
# kernel with kernels_test beside it and runs the tests of that instruction set: the instructions' encodings, the tiles'
# configuration and the server's own check of its kernels are then another's reading of Intel's manual, not ours.
#   tests/kernels/emulated_amx.sh [FOLDER [FILTER]]     default: a temporary folder; AMX' tests but one
# Needs root, debootstrap, the network, ./run test before, and some ten minutes. Exits with 0 when all tests have passed.
#
# Linux gives a process tiles only on processors with XFD, which Bochs has not. So the kernel is told that there is no AMX, a
# module turns the tiles on in XCR0, and a library preloaded to the tests grants what the kernel would refuse. That the
# kernel saves tiles when threads take turns is therefore not seen here.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=$PWD/build/release
test=$build/tests/kernels_test
folder=${1:-$(mktemp -d)}
# The one left out had not ended after four minutes: its threads take turns on one slow processor.
filter=${2:-'*/bf16_amx:*amx_bf16*:LinearDispatch.*:-*PrefillChunksAndDecodeGiveTheSameBits*'}
[ "$(id -u)" -eq 0 ] || { echo "needs root, for chroot" >&2; exit 77; }
command -v debootstrap >/dev/null || { echo "needs debootstrap" >&2; exit 77; }
[ -x "$test" ] || { echo "build first: ./run test" >&2; exit 1; }

mkdir -p "$folder"
root=$folder/root
if [ ! -e "$root/done" ]; then
  echo "== an emulator and a kernel, in $root"
  debootstrap --variant=minbase --include=busybox-static,xorriso,grub-pc-bin,grub-common,mtools,make,gcc trixie "$root" >"$folder/debootstrap.log"
  cp /etc/resolv.conf "$root/etc/"
  cat >"$root/fetch.sh" <<'INSIDE'
set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends bochs bochs-term bochsbios vgabios linux-headers-amd64
release=$(ls /lib/modules)
cd /tmp
apt-get download -qq "linux-image-$release"
dpkg -x linux-image-*.deb /image
make -C "/lib/modules/$release/build" M=/module modules
INSIDE
  mkdir "$root/module"
  echo 'obj-m += amx_on.o' >"$root/module/Makefile"
  cat >"$root/module/amx_on.c" <<'C'
#include <linux/module.h>
static int __init TurnOn(void) {
  u32 low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  asm volatile("xsetbv" : : "a"(low | 0x60000), "d"(high), "c"(0));
  return 0;
}
module_init(TurnOn);
MODULE_LICENSE("GPL");
C
  chroot "$root" sh /fetch.sh >"$folder/fetch.log" 2>&1 || { tail -n 20 "$folder/fetch.log" >&2; exit 1; }
  touch "$root/done"
fi

echo "== a disk with the tests"
guest=$folder/guest
disk=$root/disk
rm -rf "$guest" "$disk" "$root/serial.txt"
mkdir -p "$guest"/{bin,lib64,proc,sys,dev,tmp} "$disk/boot/grub"
cp "$root/usr/bin/busybox" "$guest/bin/"
strip -o "$guest/kernels_test" "$test"
ldd "$test" | grep -o '/[^ ]*' | while read -r library; do
  mkdir -p "$guest$(dirname "$library")"
  cp -L "$library" "$guest$library"
done
cp "$root/module/amx_on.ko" "$guest/"
gcc -O1 -shared -fPIC -o "$guest/grant.so" -x c - <<'C'
#include <errno.h>
#include <stdarg.h>
#include <sys/syscall.h>
long syscall(long number, ...) {
  long of[6];
  va_list list;
  va_start(list, number);
  for (int i = 0; i < 6; ++i) of[i] = va_arg(list, long);
  va_end(list);
  if (number == SYS_arch_prctl && of[0] == 0x1023) return 0;  // ARCH_REQ_XCOMP_PERM
  register long r10 asm("r10") = of[3];
  register long r8 asm("r8") = of[4];
  register long r9 asm("r9") = of[5];
  long result;
  asm volatile("syscall"
               : "=a"(result)
               : "a"(number), "D"(of[0]), "S"(of[1]), "d"(of[2]), "r"(r10), "r"(r8), "r"(r9)
               : "rcx", "r11", "memory");
  if (result < 0 && result > -4096) return errno = (int)-result, -1;
  return result;
}
C
cat >"$guest/init" <<INIT
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
exec >/dev/ttyS0 2>&1
/bin/busybox insmod /amx_on.ko
LD_PRELOAD=/grant.so /kernels_test --gtest_color=no --gtest_filter='$filter'
echo "exit code \$?"
/bin/busybox sleep 1
/bin/busybox reboot -f
INIT
chmod +x "$guest/init"
(cd "$guest" && find . | "$root/usr/bin/busybox" cpio -o -H newc) | gzip -1 >"$disk/boot/tests.gz"
cp "$root"/image/boot/vmlinuz-* "$disk/boot/linux"
# Without ACPI, whose system management mode this Bochs leaves in disorder, and without a second interrupt controller.
cat >"$disk/boot/grub/grub.cfg" <<'GRUB'
set timeout=0
menuentry tests {
  linux /boot/linux console=ttyS0,115200 quiet nokaslr mitigations=off acpi=off noapic clearcpuid=amx_tile rdinit=/init
  initrd /boot/tests.gz
}
GRUB
chroot "$root" grub-mkrescue -o /disk.iso /disk >"$folder/disk.log" 2>&1 || { tail -n 5 "$folder/disk.log" >&2; exit 1; }
cat >"$root/bochsrc" <<'BOCHS'
display_library: rfb, options="timeout=0"
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/vgabios/vgabios.bin
cpu: model=sapphire_rapids, count=1, ips=100000000
memory: guest=1024, host=1024
ata0-master: type=cdrom, path=/disk.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=/serial.txt
log: /bochs.log
panic: action=fatal
BOCHS

echo "== the tests"
mkdir -p "$root/dev"
mountpoint -q "$root/dev" || mount --bind /dev "$root/dev"
chroot "$root" bochs -q -f /bochsrc >"$folder/bochs.out" 2>&1 &
bochs=$!
trap 'kill $bochs 2>/dev/null || true; umount -l "$root/dev" || true' EXIT
shown=0
while kill -0 $bochs 2>/dev/null; do
  sleep 2
  [ -e "$root/serial.txt" ] || continue
  size=$(stat -c %s "$root/serial.txt")
  tail -c +$((shown + 1)) "$root/serial.txt" | head -c $((size - shown))
  shown=$size
  ! grep -q '^exit code' "$root/serial.txt" || break
done
code=$(sed -n 's/^exit code \([0-9]*\).*/\1/p' "$root/serial.txt" 2>/dev/null || true)
[ -n "$code" ] || { echo "the emulator ended before the tests did: $root/bochs.log" >&2; exit 1; }
exit "$code"
