/// <reference types="vitest/config" />
import { svelte } from '@sveltejs/vite-plugin-svelte'
import { defineConfig } from 'vite'
import { singleFile } from './build/single-file.ts'

const api = `http://127.0.0.1:${process.env.API_PORT ?? 8000}`
const ROUTES = ['settings', 'health', 'generate', 'sessions', 'requests', 'docs', 'openapi.json']

export default defineConfig({
  base: './',
  plugins: [svelte(), singleFile()],
  build: {
    target: 'es2022',
    modulePreload: { polyfill: false },
    assetsInlineLimit: 0,
    rolldownOptions: { output: { codeSplitting: false } },
  },
  server: {
    port: Number(process.env.FRONTEND_PORT ?? 5173),
    strictPort: true,
    proxy: Object.fromEntries(ROUTES.map((route) => [`/${route}`, api])),
  },
  test: { include: ['src/**/*.test.ts'], environment: 'node' },
})
